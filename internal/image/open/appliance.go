package open

import (
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/image/ova"
	"github.com/backstay/backstay/internal/image/vmdk"
)

// openAppliance opens a disk of the appliance in f. The disk is a file in the
// archive and may name no other, not even one beside the archive.
func openAppliance(f image.File, disk string, o image.OpenOptions) (image.Image, error) {
	return asImage(ova.Open(f, disk, func(member image.File, format image.Format) (image.Image, error) {
		if format == image.VMDK {
			return asImage(vmdk.Open(member, image.OpenOptions{Snapshot: o.Snapshot}))
		}
		return openAs(member, "", format, image.OpenOptions{Snapshot: o.Snapshot}, &files{})
	}))
}
