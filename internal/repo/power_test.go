package repo

import (
	"math/rand/v2"
	"testing"

	"github.com/backstay/backstay/internal/blob/file"
	"github.com/backstay/backstay/internal/blob/file/filetest"
	"github.com/backstay/backstay/internal/point"
)

// Whenever the power goes, and whatever of the unsynced writes it takes or
// tears: every point that was reported committed is there and complete, and so
// is every other that can be seen.
func TestCommitsSurvivePowerCuts(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	a, b := disks()
	base := filetest.New()
	open := func(d *filetest.Disk) *file.Store { return file.OpenFS(d, "disk") }
	mustInit(t, open(base))
	h := &history{}
	first := mustBackup(t, mustOpen(t, open(base)), "web01", a, nil, nil)
	h.add(first, a)
	for cut := 0; ; cut += stride() {
		disk := base.Reboot(rng) // everything was synced: a copy
		disk.CutAfter(cut)
		p, err := runBackup(open(disk), b, first, a)
		must := []*point.RestorePoint{first}
		if p != nil {
			h.add(p, b)
		}
		if err == nil {
			must = append(must, p)
			if r, verr := OpenKeyless(bg, open(disk)); verr == nil {
				r.Vacuum(bg, VacuumOptions{})
			}
		}
		after := disk.Reboot(rng)
		r := mustBeWhole(t, open(after), h, must...)
		next := mustBackup(t, r, "web01", b, first, a)
		h.add(next, b)
		mustBeWhole(t, open(after), h, append(must, next)...)
		if !disk.Off() {
			return // backup and vacuum needed only so many writes
		}
	}
}
