"""The forms in which people have COCO's content: under another key, inside of each other, spelled otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

LISTS = ("images", "annotations", "categories")
# What the mask of an annotation is called elsewhere.
_MASKS = ("segmentations", "polygon", "polygons", "segments", "rle", "mask")


def usual(content: Any, note: Callable[[str], None] = lambda _: None) -> Any:
    """Return the content as COCO writes it; what is not COCO stays as it is."""
    if isinstance(content, list):
        return _of_detectron(content, note)
    if not isinstance(content, Mapping):
        return content
    if not _has(content, "images"):
        inner = [each for each in content.values() if isinstance(each, Mapping) and _has(each, "images")]
        if len(inner) == 1:
            note("everything under one more key")
            [content] = inner
    spelled = {key.lower(): key for key in content if isinstance(key, str)}
    renamed = {spelled[key]: key for key in LISTS if key in spelled and key not in content}
    if renamed:
        note("keys in capitals")
        content = {renamed.get(key, key): value for key, value in content.items()}
    if "videos" in content and "images" not in content:
        content = _frames(content, note)
    if "annotations" not in content and "images" in content:
        content = _nested(content, note)
    return {**content, **_categories(content, note)}


def is_instances(content: Any) -> bool:
    """Whether a JSON file holds COCO instances."""
    content = usual(content)
    if not isinstance(content, Mapping) or _lacks(content):
        return False
    return not any(isinstance(each, Mapping) and "segments_info" in each for each in _values(content["annotations"]))


def _values(content: Any) -> list[Any]:
    return list(content.values()) if isinstance(content, Mapping) else content


def _lacks(content: Mapping[str, Any]) -> bool:
    return not all(isinstance(content.get(key), (list, dict)) for key in ("images", "annotations"))


def mask_of(annotation: Mapping[str, Any], note: Callable[[str], None]) -> Any:
    """Return the segmentation of an annotation, whatever it is called."""
    if "segmentation" not in annotation:
        for key in _MASKS:
            if isinstance(annotation.get(key), (list, Mapping)):
                note(f'masks under the key "{key}"')
                return annotation[key]
    return annotation.get("segmentation")


def _has(content: Mapping[str, Any], name: str) -> bool:
    return any(isinstance(key, str) and key.lower() == name for key in content)


def _nested(content: Mapping[str, Any], note: Callable[[str], None]) -> Mapping[str, Any]:
    """Take the annotations out of their images."""
    images = content["images"]
    images = list(images.values()) if isinstance(images, Mapping) else images
    if not isinstance(images, list) or not images or not all(_holds_annotations(each) for each in images):
        return content
    note("annotations inside of their images")
    numbered = [{**image, "id": image.get("id", image.get("image_id", place))} for place, image in enumerate(images)]
    annotations = [{**each, "image_id": image["id"]} for image in numbered for each in image["annotations"]]
    return {**content, "images": numbered, "annotations": annotations}


def _frames(content: Mapping[str, Any], note: Callable[[str], None]) -> Mapping[str, Any]:
    """Take the frames of YouTube-VIS's videos for images, and its tracks for an instance in each frame."""
    images, annotations = [], []
    try:
        for video in content["videos"]:
            sides = {side: video[side] for side in ("height", "width")}
            for place, name in enumerate(video["file_names"]):
                images.append({"id": f"{video['id']}/{place}", "file_name": name, **sides})
        for track in content["annotations"]:
            for place, mask in enumerate(track["segmentations"]):
                owner = f"{track['video_id']}/{place}"
                one = {key: track[key] for key in ("id", "category_id", "iscrowd") if key in track}
                annotations += [{**one, "image_id": owner, "segmentation": mask}] if mask else []
    except (LookupError, TypeError):
        return content
    note("frames of videos as images: a video should be in one part, which --val can say")
    return {**content, "images": images, "annotations": annotations}


def _holds_annotations(image: Any) -> bool:
    listed = image.get("annotations") if isinstance(image, Mapping) else None
    return isinstance(listed, list) and all(isinstance(each, Mapping) for each in listed)


def _of_detectron(content: list[Any], note: Callable[[str], None]) -> Any:
    """Read Detectron2's list of dicts, one for each image; its classes are numbered and have no names."""
    if not content or not all(_holds_annotations(each) and "file_name" in each for each in content):
        return content
    note("a list of images with their annotations, as Detectron2 has them, its classes without names")
    found = dict(_nested({"images": content}, lambda _: None))
    for annotation in found["annotations"]:
        box = annotation.get("bbox")
        # Detectron2's BoxMode: 0 is by two corners, 1 by one corner and the size.
        whole = isinstance(box, list) and len(box) == 4 and all(isinstance(each, (int, float)) for each in box)
        if annotation.get("bbox_mode") == 0 and whole:
            annotation["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    numbers = {each["category_id"] for each in found["annotations"] if isinstance(each.get("category_id"), int)}
    found["categories"] = [{"id": number, "name": f"class {number}"} for number in sorted(numbers)]
    return found


def _categories(content: Mapping[str, Any], note: Callable[[str], None]) -> dict[str, Any]:
    """Return categories that were written as names only, numbered as the annotations number them."""
    written = content.get("categories")
    if isinstance(written, Mapping) and written and all(isinstance(name, str) for name in written.values()):
        note("categories as a dict of names")
        return {"categories": [{"id": number, "name": name} for number, name in written.items()]}
    if isinstance(written, list) and written and all(isinstance(name, str) for name in written):
        note("categories as a list of names")
        annotations = content.get("annotations")
        listed = list(annotations.values()) if isinstance(annotations, Mapping) else annotations or []
        used = [each.get("category_id") for each in listed if isinstance(each, Mapping)]
        first = 0 if 0 in used or "0" in used else 1
        return {"categories": [{"id": first + place, "name": name} for place, name in enumerate(written)]}
    return {}
