"""What an answer must look like: from a request's schema to the tokens that may come next."""
