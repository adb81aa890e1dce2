package backup

import (
	"testing"

	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/vm"
)

func TestUniqueName(t *testing.T) {
	at := func(name, host, uuid string) *point.RestorePoint {
		m := vm.Machine{Name: "disk.qcow2", UUID: uuid}
		if host != "" {
			m.Host, m.HostID = host, "id-"+host
		}
		return &point.RestorePoint{VM: name, Machine: m}
	}
	const plain, onB = "disk.qcow2", "disk.qcow2@b"
	for _, c := range []struct {
		name string
		all  []*point.RestorePoint
		uuid string
		want string // for host b
	}{
		{"the first", nil, "", plain},
		{"its own", []*point.RestorePoint{at(plain, "b", "")}, "", plain},
		{"another host's", []*point.RestorePoint{at(plain, "a", "")}, "", onB},
		{"again", []*point.RestorePoint{at(plain, "a", ""), at(onB, "b", "")}, "", onB},
		{"the other's are gone", []*point.RestorePoint{at(onB, "b", "")}, "", onB},
		{"from before hosts were noted", []*point.RestorePoint{at(plain, "", "")}, "", plain},
		{"given by hand", []*point.RestorePoint{at("both", "a", ""), at("both", "b", "")}, "", plain},
		{"another VM of this host", []*point.RestorePoint{at(plain, "b", "1")}, "", plain},
		{"moved here", []*point.RestorePoint{at(plain, "a", "1")}, "1", plain},
		{"another host's VM", []*point.RestorePoint{at(plain, "a", "1")}, "2", onB},
	} {
		m := at("", "b", c.uuid).Machine
		if got := uniqueName(m, c.all); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}
