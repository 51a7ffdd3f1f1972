"""What a person may say about a folder of data that does not lie in it."""

from __future__ import annotations

from typing import NamedTuple

COMPONENTS, CLASSES, INSTANCES = "components", "classes", "instances"
SEMANTIC = (COMPONENTS, CLASSES, INSTANCES)
IGNORE = "ignore"
CROWD = (IGNORE, INSTANCES)


# A piece of a large image is about as long as this, or as two crops.
PIECE = 2048


class DataOptions(NamedTuple):
    """How to read a folder."""

    format: str | None = None  # the name of a reader; None: the first that recognizes the folder
    annotations: str | None = None  # the file of annotations; None: found by what it holds
    images: str | None = None  # the folder of the images that it names; None: anywhere in the folder
    # what is held out: a folder, a file of annotations, a share such as 0.2, or a text file with names of images;
    # None: as the folder says, else one image in five
    val: str | None = None
    # what the numbers of label maps are: "components", classes whose connected regions are the instances;
    # "classes", classes of which each is one mask; "instances"; None: instances, unless they look like classes
    semantic: str | None = None
    # the number of pixels in label maps that belong to nothing known; None: 255 beside classes
    ignore_value: int | None = None
    # what annotations with iscrowd 1 are, "ignore" (regions) or "instances"; None: regions, unless all run
    # lengths are crowds
    crowd: str | None = None
    crop: int | None = None  # the side of the squares to cut out of images; None: images are shown whole

    @property
    def pieces(self) -> int | None:
        """The side of the pieces into which images beyond the limit of pixels are cut; None: they are refused."""
        return max(PIECE, 2 * self.crop) if self.crop else None
