package restore

import (
	"testing"

	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/vm"
)

// One disk restored into a directory has the name that it has beside all the
// others.
func TestFileOf(t *testing.T) {
	_, p := machine()
	for _, c := range []struct {
		id     vm.DiskID
		format image.Format
		want   string
		is     image.Format
	}{
		{"vda", "", "vda.qcow2", image.Qcow2},
		{"vda", image.VHDX, "vda.vhdx", image.VHDX},
		{"data.vhdx", "", "data.raw", image.Raw},
	} {
		if name, f := FileOf(p, c.id, c.format); name != c.want || f != c.is {
			t.Errorf("%s as %q: %s, %s", c.id, c.format, name, f)
		}
	}
}
