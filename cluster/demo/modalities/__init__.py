"""The demo's modalities, one file each. To add one, write its file and add its line here."""

from cluster.demo.modalities.fundus import FUNDUS
from cluster.demo.modalities.histology import HISTOLOGY
from cluster.demo.modalities.radiograph import RADIOGRAPH
from cluster.demo.modalities.ultrasound import ULTRASOUND
from cluster.demo.modality import Modality

MODALITIES: dict[str, Modality] = {
    "radiograph": RADIOGRAPH,
    "ultrasound": ULTRASOUND,
    "histology": HISTOLOGY,
    "fundus": FUNDUS,
}
