medical: derived CT images are named and not analysed as HU

Projections, monoenergetic images, material and perfusion maps, dose reports and
screens are told by Image Type or Series Description; units other than HU are
refused.
