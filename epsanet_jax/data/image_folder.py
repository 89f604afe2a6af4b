"""A folder of class folders as a source of images."""

import os

from epsanet_jax.data import classes
from epsanet_jax.data.sources import Record, fingerprint_of
from epsanet_jax.data.walk import Folder, is_there, no_image, read_file, skipped_line, walk
from epsanet_jax.errors import InputError, some


class ImageFolder:
    """A folder with one folder of images per class, in the layout and order of torchvision.

    The labels follow the sorted names of the classes; names that are the numbers 0 to N-1 are the labels. The
    images of a class are all image files below its folder, in the order of `walk.walk`. The fingerprint
    depends only on the relative paths, and on the classes if their order is not that of their folders.

    Attributes:
        root: path of the folder, on a local disk.
        class_names: names of the classes in Unicode's composed form, without those of `empty`.
        files: path of each image relative to the root.
        labels: label of each image.
        skipped: 'PATH: reason' for each entry that is skipped, see `walk.walk`.
        empty: names of the class folders without images.

    Args:
        root: path of the folder.
        allow_empty: leave out classes without images; otherwise they are an error.

    Raises:
        InputError: the folder does not exist, holds no class folder or an empty one, two class folders have
            one name, or a folder cannot be read.
    """

    def __init__(self, root: str | os.PathLike[str], allow_empty: bool = False):
        self.root = os.fspath(root)
        if not is_there(self.root) or not os.path.isdir(self.root):
            raise InputError(f'no such data directory: {self.root}')
        skipped: list[str] = []
        folders = walk(self.root, on_skipped=skipped.append)
        names = next(folders, Folder('', (), ())).folders
        if not names:
            reason = f'; {skipped_line(self.root, skipped)}' if skipped else ''
            raise InputError(
                f'no class folders in {self.root}: expected one folder of images per class{reason}'
            )
        self.files: list[str] = []
        found: list[str] = []  # the class of each image
        for folder in folders:
            self.files += [os.path.join(folder.path, entry.name) for entry in folder.images]
            found += [classes.composed(folder.path.split(os.sep)[0])] * len(folder.images)
        composed = {classes.composed(name): name for name in names}
        if len(composed) < len(names):
            twice = sorted({name for name in names if composed[classes.composed(name)] != name})
            raise InputError(f'{self.root} holds two spellings of one class name, {some(twice)}: merge them')
        self.empty = tuple(sorted(composed.keys() - set(found)))
        if self.empty and not (allow_empty and found):
            folder = os.path.join(self.root, composed[self.empty[0]])
            raise InputError(f'empty class folder: {no_image(folder, self.root, skipped)}')
        self.class_names = classes.in_order([name for name in composed if name not in self.empty])
        labels = {name: label for label, name in enumerate(self.class_names)}
        self.labels = [labels[name] for name in found]
        self.skipped = tuple(skipped)
        in_order_of_folders = self.class_names == tuple(map(classes.composed, sorted(composed.values())))
        self.fingerprint = fingerprint_of([*self.files, *(() if in_order_of_folders else self.class_names)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        return {'image': read_file(self.name_of(index)), 'label': self.labels[index]}

    def name_of(self, index: int) -> str:
        """Returns the path of the image."""
        return os.path.join(self.root, self.files[index])
