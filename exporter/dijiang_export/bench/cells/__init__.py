"""What `bench step`, `bench products` and `bench sampling` share: sizes, and everybody at each of them."""
