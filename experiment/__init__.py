"""What happens around the epochs, in the process that you started; each file here is a room with one job."""
