//go:build linux && amd64

package kvm

import (
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/vm"
)

// The main road: a full backup of a running guest, then an incremental, each
// frozen with its hook, and an aborted one in between that costs nothing.
func TestFullThenIncremental(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	first := h.backup(repoA, nil, hypervisor.Options{Consistency: vm.RequireApplication, FreezeLimit: patient})
	h.wantModes(first, "vda full (first backup), vdb full (first backup), vdc full (first backup)")
	if first.Grade() != vm.GradeApplication || first.FrozenFor() <= 0 {
		t.Errorf("grade %s, frozen for %v", first.Grade(), first.FrozenFor())
	}
	if w := first.Warnings(); len(w) > 0 {
		t.Errorf("warnings %q", w)
	}
	h.wantClean(first.checkpoint())
	h.write("vdb", 1<<20, 64<<10, 1)

	aborted, err := h.begin(h.Driver, repoA, first, hypervisor.Options{})
	h.ok(err)
	h.read(aborted, first)
	h.ok(aborted.Abort(h.ctx))
	h.ok(aborted.Abort(h.ctx))
	h.wantClean(first.checkpoint())

	h.write("vdb", 5<<20, 512, 2)
	second := h.backup(repoA, first, hypervisor.Options{Consistency: vm.RequireApplication, FreezeLimit: patient})
	h.wantModes(second, "vda incremental, vdb incremental, vdc compared (raw disks keep no bitmaps: everything is read and compared)")
	h.wantClean(second.checkpoint())
	h.ok(second.Commit(h.ctx))
	if first.checkpoint() == second.checkpoint() {
		t.Error("a checkpoint's name was used twice")
	}
	if m := second.Machine(); m.Name != "web01" || m.UUID == "" || m.HostID == "" || m.State != "running" || len(m.Disks) != 3 {
		t.Errorf("machine %+v", m)
	}
	if c := second.Config(); len(c) == 0 || c[0].Name != "domain.xml" || !strings.Contains(string(c[0].Data), "<name>web01</name>") {
		t.Errorf("config %v", c)
	}
	t.Logf("frozen for %v and %v", first.FrozenFor(), second.FrozenFor())
}
