"""What a program costs: times measured here, a compiler's counts and a roofline for machines that are not here."""
