"""What a GPU is asked, as ``make gpu`` does it: is it right, how fast is it, does it work on many, does it train."""
