"""Letters: the 20,000 of Frey and Slate 1991, sixteen measurements of each, from a file that the user has fetched.

No package of Python ships them. Debian's `r-cran-mlbench` does, and the UCI repository; the file has the format of the
latter, one letter and sixteen numbers to a line, separated by commas. From R:

    write.table(mlbench::LetterRecognition, "letter-recognition.data", sep = ",", quote = FALSE,
                row.names = FALSE, col.names = FALSE)
"""

import string
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.protocol.spec import SpecError
from tests.protocol.tabular import divided, standardised
from tests.protocol.task import Task

FILE = "letter-recognition.data"


def letters(folder: Path) -> Task:
    """14,000 and 6,000 capital letters in many fonts, 16 measurements.

    Raises:
        SpecError: the folder has no such file.
    """
    file = folder / FILE
    if not file.is_file():
        raise SpecError(f"letters: there is no {file}; tests/protocol/letters.py says where it comes from")
    names, *columns = np.loadtxt(file, delimiter=",", dtype=str, unpack=True)
    labels = np.array([ord(name) - ord("A") for name in names])
    task = divided(np.stack(columns, 1).astype(np.float32), labels)
    return standardised(replace(task, classes=len(string.ascii_uppercase)))
