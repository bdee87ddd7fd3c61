"""What lets other servers run exported packages; their engines, none of our own."""
