"""Data for fusers that are shipped, built from public text so that anyone can make them again."""
