package restore

import (
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

// One disk restored into a directory has the name that it has beside all the
// others.
func TestFileOf(t *testing.T) {
	_, p := machine()
	p.Disks = append(p.Disks, point.Disk{Disk: vm.Disk{ID: "old", Format: "vdi"}, Manifest: "m1"})
	for _, c := range []struct {
		id     vm.DiskID
		format image.Format
		want   string
		is     image.Format
	}{
		{"vda", "", "vda.qcow2", image.Qcow2},
		{"vda", image.VHDX, "vda.vhdx", image.VHDX},
		{"data.vhdx", "", "data.raw", image.Raw},
		{"old", "", "old.raw", image.Raw}, // of a format that is only read
	} {
		if name, f := FileOf(p, c.id, c.format); name != c.want || f != c.is {
			t.Errorf("%s as %q: %s, %s", c.id, c.format, name, f)
		}
	}
}
