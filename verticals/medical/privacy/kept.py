"""What a de-identified image keeps: nothing but what stands here (an allow-list).

After the Basic Application Level Confidentiality Profile of DICOM PS3.15 annex E, which lists what
to remove. A list of what to keep is stricter: an attribute that nobody thought of is gone.
"""

from __future__ import annotations

import re

from plinth.verticals.medical.volumes.terms import BODY_PART, KERNEL


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


IMAGES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
    "1.2.840.10008.5.1.4.1.1.130": "PT",
}
"""SOP classes that are taken, and their modality. All others are refused: screens, reports and
ultrasound show names in their pixels."""

UIDS = _names(
    "StudyInstanceUID SeriesInstanceUID SOPInstanceUID FrameOfReferenceUID "
    "DimensionOrganizationUID ConcatenationUID"
)
"""Identifiers that are replaced, each by the same new one wherever it stands."""

DATES = _names(
    "StudyDate SeriesDate AcquisitionDate ContentDate AcquisitionDateTime FrameReferenceDateTime "
    "FrameAcquisitionDateTime RadiopharmaceuticalStartDateTime "
    "RadiopharmaceuticalStopDateTime"
)
"""Dates that are moved, all of a patient by the same number of days."""

TIMES = _names(
    "StudyTime SeriesTime AcquisitionTime ContentTime RadiopharmaceuticalStartTime "
    "RadiopharmaceuticalStopTime"
)
"""Times of day, which stay: uptake and decay are counted from them."""

NUMBERS = _names(
    # how the pixels are stored
    "Rows Columns NumberOfFrames SamplesPerPixel BitsAllocated BitsStored HighBit "
    "PixelRepresentation PlanarConfiguration PixelPaddingValue PixelPaddingRangeLimit "
    "SmallestImagePixelValue LargestImagePixelValue RescaleSlope RescaleIntercept WindowCenter "
    "WindowWidth "
    # where they lie
    "ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness SliceLocation "
    "SpacingBetweenSlices GantryDetectorTilt ReconstructionDiameter TableHeight "
    "InstanceNumber SeriesNumber AcquisitionNumber ImagesInAcquisition NumberOfSlices "
    "NumberOfTimeSlices ImageIndex InStackPositionNumber TemporalPositionIndex "
    "TemporalPositionIdentifier NumberOfTemporalPositions DimensionIndexValues "
    "FrameAcquisitionNumber InConcatenationNumber InConcatenationTotalNumber "
    # how they were made
    "KVP XRayTubeCurrent Exposure ExposureTime RepetitionTime EchoTime EffectiveEchoTime "
    "EchoNumbers EchoTrainLength FlipAngle InversionTime MagneticFieldStrength ImagingFrequency "
    "NumberOfAverages PixelBandwidth TriggerTime DiffusionBValue DiffusionGradientOrientation "
    "NominalPercentageOfCardiacPhase NominalCardiacTriggerDelayTime CTDIvol SpiralPitchFactor "
    # what a PET image is worth
    "FrameReferenceTime ActualFrameDuration DecayFactor DoseCalibrationFactor "
    "ScatterFractionFactor RadiopharmaceuticalVolume RadionuclideTotalDose RadionuclideHalfLife "
    "RadionuclidePositronFraction LossyImageCompressionRatio"
)
"""Attributes of numbers that say nothing of a person."""

CHARACTERISTICS = _names("PatientAge PatientSex PatientSize PatientWeight")
"""Kept where it is asked for (PS3.15 Retain Patient Characteristics Option); SUV needs weight."""

SEQUENCES = _names(
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence PlanePositionSequence "
    "PlaneOrientationSequence PixelMeasuresSequence PixelValueTransformationSequence "
    "FrameContentSequence FrameVOILUTSequence CTImageFrameTypeSequence MRImageFrameTypeSequence "
    "MREchoSequence MRTimingAndRelatedParametersSequence MRDiffusionSequence "
    "DiffusionGradientDirectionSequence CTXRayDetailsSequence CTReconstructionSequence "
    "RadiopharmaceuticalInformationSequence"
)
"""Sequences whose items are gone through by the same lists."""

TERMS = {
    "Modality": re.compile("CT|MR|PT"),
    "PhotometricInterpretation": re.compile("MONOCHROME[12]"),
    "RescaleType": re.compile("HU|US|OD|MGML|HU_MOD|PCT|Z_EFF|ED|EDW"),
    "Units": re.compile("CNTS|BQML|GML|NONE|PROPCNTS|CPS|PROPCPS|CM2ML|MLG"),
    "SUVType": re.compile("BW|BSA|LBM|LBMJANMA|LBMJAMES128|IBW"),
    "DecayCorrection": re.compile("START|ADMIN|NONE"),
    "CorrectedImage": re.compile(
        "DECY|ATTN|SCAT|DTIM|MOTN|PMOT|CLN|RAN|RADL|DCAL|NORM|FLEX|RECNST|EDGE", re.A
    ),
    "PatientPosition": re.compile("(HF|FF)(S|P|DL|DR)|(LF|RF)(S|P|D[LR])?"),
    "ImageType": re.compile(
        "ORIGINAL|DERIVED|PRIMARY|SECONDARY|MIXED|AXIAL|LOCALIZER|REFORMATTED|VOLUME|NONE|OTHER|M|P|"
        "R|I|FFE|SE|NORM|DIS2D|DIS3D|ND|MPR|AVERAGE|RESAMPLED|DIFFUSION|ADC|CT_SOM[57]|SPI|SEQ|"
        "STATIC|DYNAMIC|GATED|WHOLE BODY|IMAGE|HELIX|CONTIGUOUS|PHASE MAP|MAX_IP|MIN_IP|MAXIMUM|"
        "MINIMUM|MIP|MINIP|PROJECTION|SUBTRACTION|MONOENERGETIC|VMI|IODINE|VNC"
    ),
    "FrameType": re.compile("ORIGINAL|DERIVED|PRIMARY|SECONDARY|MIXED|VOLUME|NONE|AXIAL|M|P|R|I"),
    "BurnedInAnnotation": re.compile("NO"),
    "LossyImageCompression": re.compile("00|01"),
    "LossyImageCompressionMethod": re.compile(
        r"ISO_(10918|14495|15444|13818|14496|23008|18181)_\d+"
    ),
    "ConvolutionKernel": KERNEL,
    "VOILUTFunction": re.compile("LINEAR|LINEAR_EXACT|SIGMOID"),
    "BodyPartExamined": BODY_PART,
    "ScanningSequence": re.compile("SE|IR|GR|EP|RM"),
    "SequenceVariant": re.compile("SK|MTC|SS|TRSS|SP|MP|OSP|TOF|NONE"),
    "MRAcquisitionType": re.compile("2D|3D"),
    "ComplexImageComponent": re.compile("MAGNITUDE|PHASE|REAL|IMAGINARY|MIXED"),
    "SeriesType": re.compile("STATIC|DYNAMIC|GATED|WHOLE BODY|IMAGE|REPROJECTION"),
    "TimezoneOffsetFromUTC": re.compile(r"[+-](0\d|1[0-4])[0-5]\d"),
    "PatientSex": re.compile("[FMO]"),
    "PatientAge": re.compile(r"0[0-8]\d[DWMY]"),
}
"""Text that is kept where each of its values is one of these, which no name is. The offset from UTC
stays (PS3.15 E.3.6 allows it with modified dates): date-times keep theirs, and without it they
cannot be read on the clock of the other times."""

STAND_INS = _names(
    "ConvolutionKernel RescaleType ImageType FrameType FilterType ScanOptions StackID "
    "SeriesDescription ProtocolName"
)
"""Text that tells images of one series apart, or what their values are: where it is not one of
TERMS, a stand-in made with the key takes its place, alike for alike text. Were it removed, two
reconstructions would become one volume, and a map without a unit would become HU."""
