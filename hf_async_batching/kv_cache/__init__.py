"""Who owns which page of keys and values, and the tensors behind the pages."""
