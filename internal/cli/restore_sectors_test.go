package cli

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/restore"
	"github.com/backstay/backstay/internal/vm"
)

// A disk whose sectors are not those that its restored image tells is named.
func TestSectorsLost(t *testing.T) {
	var def vm.Definition
	if err := json.Unmarshal([]byte(`{"v":1,"hypervisor":"hyperv","disks":[{"id":"a"},{"id":"b","sector_bytes":4096},{"id":"c","sector_bytes":77}]}`), &def); err != nil {
		t.Fatal(err)
	}
	for marked, want := range map[int]string{0: "disk b had sectors of 4096 bytes", 4096: ""} {
		got := sectorsLost([]restore.Result{{Disk: "a"}, {Disk: "b", SectorBytes: marked}, {Disk: "c"}}, sectorsOf(def))
		if len(got) > 1 || (len(got) == 1) != (want != "") || !strings.Contains(strings.Join(got, ""), want) {
			t.Errorf("marked %d: %q, want %q", marked, got, want)
		}
	}
}
