package cli

import (
	"context"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/restore"
)

// blobs is a repository with one file of a definition.
type blobs struct {
	restore.Repository
	data string
}

func (b blobs) ReadBlob(context.Context, point.Blob) ([]byte, error) { return []byte(b.data), nil }

// A disk whose sectors are not those of the restored one is named, wherever it
// came from.
func TestSectorsLost(t *testing.T) {
	for _, c := range []struct{ name, data, want string }{
		{"vm.json", `{"v":1,"hypervisor":"hyperv","disks":[{"id":"a"},{"id":"b","sector_bytes":4096},{"id":"c","sector_bytes":4096}]}`, "disk b had sectors of 4096 bytes"},
		{"domain.xml", `<domain type="kvm"><name>w</name><devices><disk type="file" device="disk"><blockio logical_block_size="4096"/><target dev="b"/></disk></devices></domain>`, "disk b had sectors of 4096 bytes"},
		{"vm.json", `{"v":1,"disks":[{"id":"a"},{"id":"b"}]}`, ""},
		{"other", "", ""},
		{"vm.json", `{`, "can't be read"},
	} {
		p := &point.RestorePoint{Config: map[string]point.Blob{c.name: {}}}
		got := sectorsLost(t.Context(), blobs{data: c.data}, p, []restore.Result{{Disk: "a"}, {Disk: "b"}})
		if len(got) > 1 || (len(got) == 1) != (c.want != "") || !strings.Contains(strings.Join(got, ""), c.want) {
			t.Errorf("%s %s: %q, want %q", c.name, c.data, got, c.want)
		}
	}
}
