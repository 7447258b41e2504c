"""A synthetic chest with exact truth, written as DICOM."""
