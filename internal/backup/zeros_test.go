package backup_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/point"
)

// A disk that shrinks and grows again reads as zeros where it was away, and
// QEMU's bitmap calls that unchanged.
func TestShrunkAndGrownAgain(t *testing.T) {
	w := memWorld(t, 4*mib)
	w.vm.Write("vda", 0, noise(1, 4*mib))
	w.backUp()
	end := int64(2*mib + unit/2) // in the middle of a chunk
	w.vm.ForgetZeros("vda", extent.Extent{Off: end, Len: 4*mib - end})
	w.vm.Write("vda", 3*mib, noise(2, grain))
	w.vm.TakeReads("vda")
	w.audit = 1
	res := w.backUp()
	w.wantDisk(res, point.Incremental, "")
	want := "disk vda: 6 chunks that tracking called unchanged are zeros now"
	if len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], want) || !slices.Equal(res.Point.Warnings, res.Warnings) {
		t.Errorf("warnings %q, want %q", res.Warnings, want)
	}
	if len(res.Lied)+len(res.Suspect) > 0 {
		t.Errorf("lied %q, suspect %q: the points before are good", res.Lied, res.Suspect)
	}
	if res := w.backUp(); len(res.Warnings) > 0 {
		t.Errorf("warned again: %q", res.Warnings)
	}
	w.verify(w.store)
}

// Where the source has a part of every chunk, and nothing turned to zeros,
// nothing is read that tracking does not name.
func TestSparseChunksAreNotReadAgain(t *testing.T) {
	w := memWorld(t, 4*mib)
	for i := range 16 {
		w.vm.Write("vda", int64(i)*unit, noise(1, grain))
	}
	w.backUp()
	w.vm.TakeReads("vda")
	w.backUp()
	if got, _ := w.vm.TakeReads("vda"); got != 0 {
		t.Errorf("%d bytes read", got)
	}
	w.verify(w.store)
}
