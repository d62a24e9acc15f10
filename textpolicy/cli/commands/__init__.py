"""The commands of `textpolicy`, one file each."""
