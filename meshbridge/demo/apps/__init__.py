"""Small programs that play the applications of the sample mesh; standard library only, any user can run them."""
