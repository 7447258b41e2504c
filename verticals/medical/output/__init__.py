"""Report, page, pictures and DICOM SEG."""
