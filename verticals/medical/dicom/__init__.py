"""From DICOM files to one volume with its true geometry."""
