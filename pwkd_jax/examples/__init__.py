"""Scripts to read and to run, one a use of the library; the tests run them."""
