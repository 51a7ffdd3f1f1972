"""The works that a text on the method can cite."""

from __future__ import annotations

from typing import NamedTuple


class Reference(NamedTuple):
    """A work: its line in a list of references, and its BibTeX entry."""

    line: str
    bibtex: str


REFERENCES = {
    "kirillov2020pointrend": Reference(
        "A. Kirillov, Y. Wu, K. He, R. Girshick. PointRend: Image Segmentation as Rendering. CVPR 2020.",
        r"""@inproceedings{kirillov2020pointrend,
  author    = {Kirillov, Alexander and Wu, Yuxin and He, Kaiming and Girshick, Ross},
  title     = {{PointRend}: Image Segmentation as Rendering},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages     = {9799--9808},
  year      = {2020}
}""",
    ),
    "cheng2022mask2former": Reference(
        "B. Cheng, I. Misra, A. G. Schwing, A. Kirillov, R. Girdhar. Masked-attention Mask Transformer for "
        "Universal Image Segmentation. CVPR 2022.",
        r"""@inproceedings{cheng2022mask2former,
  author    = {Cheng, Bowen and Misra, Ishan and Schwing, Alexander G. and Kirillov, Alexander and Girdhar, Rohit},
  title     = {Masked-attention Mask Transformer for Universal Image Segmentation},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages     = {1290--1299},
  year      = {2022}
}""",
    ),
    "milletari2016vnet": Reference(
        "F. Milletari, N. Navab, S.-A. Ahmadi. V-Net: Fully Convolutional Neural Networks for Volumetric "
        "Medical Image Segmentation. 3DV 2016.",
        r"""@inproceedings{milletari2016vnet,
  author    = {Milletari, Fausto and Navab, Nassir and Ahmadi, Seyed-Ahmad},
  title     = {{V-Net}: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation},
  booktitle = {International Conference on 3D Vision (3DV)},
  pages     = {565--571},
  year      = {2016}
}""",
    ),
    "carion2020detr": Reference(
        "N. Carion, F. Massa, G. Synnaeve, N. Usunier, A. Kirillov, S. Zagoruyko. End-to-End Object "
        "Detection with Transformers. ECCV 2020.",
        r"""@inproceedings{carion2020detr,
  author    = {Carion, Nicolas and Massa, Francisco and Synnaeve, Gabriel and Usunier, Nicolas and
               Kirillov, Alexander and Zagoruyko, Sergey},
  title     = {End-to-End Object Detection with Transformers},
  booktitle = {European Conference on Computer Vision (ECCV)},
  pages     = {213--229},
  year      = {2020}
}""",
    ),
    "kuhn1955hungarian": Reference(
        "H. W. Kuhn. The Hungarian Method for the Assignment Problem. Naval Research Logistics Quarterly 2, 1955.",
        r"""@article{kuhn1955hungarian,
  author  = {Kuhn, Harold W.},
  title   = {The {Hungarian} Method for the Assignment Problem},
  journal = {Naval Research Logistics Quarterly},
  volume  = {2},
  number  = {1--2},
  pages   = {83--97},
  year    = {1955}
}""",
    ),
    "lin2017focal": Reference(
        "T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollár. Focal Loss for Dense Object Detection. ICCV 2017.",
        r"""@inproceedings{lin2017focal,
  author    = {Lin, Tsung-Yi and Goyal, Priya and Girshick, Ross and He, Kaiming and Doll{\'a}r, Piotr},
  title     = {Focal Loss for Dense Object Detection},
  booktitle = {IEEE International Conference on Computer Vision (ICCV)},
  pages     = {2980--2988},
  year      = {2017}
}""",
    ),
    "loshchilov2019adamw": Reference(
        "I. Loshchilov, F. Hutter. Decoupled Weight Decay Regularization. ICLR 2019.",
        r"""@inproceedings{loshchilov2019adamw,
  author    = {Loshchilov, Ilya and Hutter, Frank},
  title     = {Decoupled Weight Decay Regularization},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2019}
}""",
    ),
    "wang2023dice": Reference(
        "Z. Wang, T. Popordanoska, J. Bertels, R. Lemmens, M. B. Blaschko. Dice Semimetric Losses: Optimizing the Dice "
        "Score with Soft Labels. MICCAI 2023.",
        r"""@inproceedings{wang2023dice,
  author    = {Wang, Zifu and Popordanoska, Teodora and Bertels, Jeroen and Lemmens, Robin and Blaschko, Matthew B.},
  title     = {{Dice} Semimetric Losses: Optimizing the {Dice} Score with Soft Labels},
  booktitle = {Medical Image Computing and Computer Assisted Intervention (MICCAI)},
  year      = {2023}
}""",
    ),
    "maskloss": Reference(
        "The maskloss authors. maskloss: point-sampled mask losses for PyTorch. VERSION. "
        "https://github.com/maskloss/maskloss.",
        r"""@misc{maskloss,
  author       = {{The maskloss authors}},
  title        = {maskloss: point-sampled mask losses for {PyTorch}},
  howpublished = {https://github.com/maskloss/maskloss},
  note         = {VERSION}
}""",
    ),
}


def reference_line(key: str, version: str | None) -> str:
    """Return a work's line in a list of references; `version` is that of maskloss, None if it is not known."""
    return REFERENCES[key].line.replace("VERSION. ", f"Version {version}. " if version else "")


def reference_entry(key: str, version: str | None) -> str:
    """Return a work's BibTeX entry; `version` is that of maskloss, None if it is not known."""
    written = f",\n  note         = {{Version {version}}}" if version else ""
    return REFERENCES[key].bibtex.replace(",\n  note         = {VERSION}", written)
