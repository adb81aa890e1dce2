package repo

import (
	"fmt"
	"testing"

	"github.com/backstay/backstay/internal/point"
)

// Many backups leave many small packs; a vacuum makes few of them, and the next
// one has nothing to do.
func TestVacuumJoinsSmallPacks(t *testing.T) {
	st, r := newRepo(t)
	var points []*point.RestorePoint
	content := func(i int) []byte { return noise(uint64(i+1), 5000) }
	for i := range manySmall {
		if i == manySmall-1 {
			if v, err := r.Vacuum(bg, VacuumOptions{}); err != nil || v.RewrittenPacks != 0 {
				t.Fatalf("few packs were rewritten: %+v, %v", v, err)
			}
		}
		points = append(points, mustBackup(t, r, fmt.Sprintf("vm%d", i), content(i), nil, nil))
	}
	if n := count(t, st, packPrefix); n != manySmall {
		t.Fatalf("%d packs", n)
	}
	if v, err := r.Vacuum(bg, VacuumOptions{DryRun: true}); err != nil || v.RewrittenPacks != manySmall || v.KeptWasteBytes < 0 {
		t.Errorf("%+v, %v", v, err)
	}
	if v, err := r.Vacuum(bg, VacuumOptions{}); err != nil || v.RewrittenPacks != manySmall {
		t.Errorf("%+v, %v", v, err)
	}
	if n := count(t, st, packPrefix); n != 1 {
		t.Errorf("%d packs are left", n)
	}
	if v, err := r.Vacuum(bg, VacuumOptions{}); err != nil || v.RewrittenPacks != 0 {
		t.Errorf("%+v, %v", v, err)
	}
	r = mustOpen(t, st)
	for i, p := range points {
		mustRead(t, r, p, content(i))
	}
	if rep, err := r.Check(bg, CheckOptions{ReadData: true}); err != nil || len(rep.Findings) != 0 {
		t.Errorf("%+v, %v", rep, err)
	}
}
