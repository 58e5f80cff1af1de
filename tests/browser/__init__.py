"Tests of pages in a real browser; a package, so that its conftest is not taken for the one above."
