package backup_test

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/extent"
	"github.com/backstay/backstay/internal/point"
)

// Tracking hides a write. The audit, looking at everything, finds it: an
// alarm, a point that is right, and the ones that rest on the lie are suspect.
func TestLyingTrackingIsCaught(t *testing.T) {
	w := memWorld(t, 4*mib)
	w.vm.Write("vda", 0, noise(1, 4*mib))
	full := w.backUp()
	w.vm.Write("vda", 0, noise(2, grain))
	honest := w.backUp()

	w.vm.Lie("vda", extent.Extent{Off: 2 * mib, Len: mib})
	w.vm.Write("vda", 2*mib+5, noise(3, 1000))
	w.vm.Write("vda", 0, noise(4, grain))
	wrong := w.backUp() // nobody looks: the point is wrong, and nobody knows
	delete(w.want, wrong.Point.Ref())

	w.audit = 1
	w.vm.TakeReads("vda")
	res := w.backUp()
	d := w.wantDisk(res, point.Compared, "change tracking of disk vda lied: 1 of 16 sampled chunks")
	if len(res.Lied) != 1 || res.Lied[0] != "vda" {
		t.Errorf("lied: %q", res.Lied)
	}
	if d.Stats.AuditBytes != 4*mib {
		t.Errorf("%d bytes audited, want all %d that tracking called unchanged", d.Stats.AuditBytes, 4*mib)
	}
	if got, _ := w.vm.TakeReads("vda"); got != 8*mib || d.Stats.ReadBytes != got {
		t.Errorf("%d bytes read, stats say %d; want the audit and the whole disk", got, d.Stats.ReadBytes)
	}

	r := w.mustOpen()
	defer r.Close()
	points, err := r.Points(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range points {
		suspect := p.ID == honest.Point.ID || p.ID == wrong.Point.ID
		if suspect != (p.Suspect != "") {
			t.Errorf("%s: suspect %q, want %v", p.Ref(), p.Suspect, suspect)
		}
	}
	if len(res.Suspect) != 2 {
		t.Errorf("suspect: %q", res.Suspect)
	}
	if full.Point.ID == points[0].ID && points[0].Suspect != "" {
		t.Error("the full one is suspect")
	}

	// Afterwards, tracking is honest and believed again.
	w.vm.Lie("vda", extent.Extent{})
	w.vm.Write("vda", mib, noise(5, grain))
	w.wantDisk(w.backUp(), point.Incremental, "")
	delete(w.want, wrong.Point.Ref())
	for _, p := range points {
		if p.ID == wrong.Point.ID {
			if err := r.DeletePoint(t.Context(), p.VM, p.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.verify(w.store)
}

// A run that dies after the alarm leaves the marks, and they make the next run
// read everything, whatever tracking says.
func TestAlarmOutlivesTheRun(t *testing.T) {
	w := memWorld(t, 4*mib)
	w.vm.Write("vda", 0, noise(1, 4*mib))
	w.backUp()
	w.vm.Lie("vda", extent.Extent{Len: mib})
	w.vm.Write("vda", 0, noise(2, 100))
	wrong := w.backUp()
	w.audit = 1
	reads := 0
	r := w.mustOpen()
	defer r.Close()
	o := w.options(r)
	o.Workers = 1
	w.vm.OnRead("vda", func(int64, int) error {
		if reads++; reads > 20 { // the audit took 16
			return errors.New("the host died")
		}
		return nil
	})
	res := backup.Run(t.Context(), o, []backup.Job{w.job()})[0]
	if res.Err == nil || len(res.Lied) != 1 {
		t.Fatalf("lied %q, %v", res.Lied, res.Err)
	}
	w.vm.OnRead("vda", nil)
	w.audit = -1
	w.wantDisk(w.backUp(), point.Compared, "the previous restore point is suspect")
	delete(w.want, wrong.Point.Ref())
	if err := r.DeletePoint(t.Context(), "web01", wrong.Point.ID); err != nil {
		t.Fatal(err)
	}
	w.verify(w.store)
}

func TestAuditSample(t *testing.T) {
	for _, c := range []struct {
		name    string
		chunks  int64
		changed int64
		share   float64
		least   int
		want    int64
	}{
		{"the default share, rounded up", 3401, 1, 0, 0, 17}, // of 3400, and 16 would be the least
		{"at least sixteen", 1000, 10, 0, 0, 16},
		{"all if there are fewer", 20, 10, 0, 0, 10},
		{"nothing is unchanged", 10, 10, 0, 0, 0},
		{"half of them", 100, 20, 0.5, 0, 40},
		{"everything", 100, 20, 1, 0, 80},
		{"most changed", 1000, 900, 0.1, 20, 20},
		{"switched off", 100, 20, -1, 0, 0},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			w := memWorld(t, c.chunks*unit)
			w.fill("vda", c.chunks)
			w.backUpSparse()
			for i := range c.changed {
				w.vm.Write("vda", i*unit, []byte{1})
			}
			w.vm.TakeReads("vda")
			r := w.mustOpen()
			defer r.Close()
			o := backup.Options{Repo: r, Now: w.clock.now, Audit: c.share, AuditLeast: c.least}
			res := backup.Run(t.Context(), o, []backup.Job{w.job()})[0]
			d := w.wantDisk(res, point.Incremental, "")
			_, what := w.vm.TakeReads("vda")
			sampled := what.Within(extent.Extent{Off: c.changed * unit, Len: (c.chunks - c.changed) * unit})
			if sampled.Bytes() != c.want*unit || d.Stats.AuditBytes != c.want*unit {
				t.Errorf("%d bytes audited, stats say %d, want %d chunks", sampled.Bytes(), d.Stats.AuditBytes, c.want)
			}
			if want := c.changed*grain + c.want*unit; d.Stats.ReadBytes != want {
				t.Errorf("%d bytes read, want %d", d.Stats.ReadBytes, want)
			}
		})
	}
}

// What the source has no data of is audited without being read.
func TestAuditOfNothing(t *testing.T) {
	const chunks = 10_000
	w := memWorld(t, chunks*unit)
	w.vm.Write("vda", 5*unit, []byte{1})
	w.backUpSparse()
	w.vm.Write("vda", 0, []byte{1})
	w.vm.TakeReads("vda")
	r := w.mustOpen()
	defer r.Close()
	o := backup.Options{Repo: r, Now: w.clock.now, Audit: 1}
	d := w.wantDisk(backup.Run(t.Context(), o, []backup.Job{w.job()})[0], point.Incremental, "")
	if want := int64(chunks-1) * unit; d.Stats.AuditBytes != want {
		t.Errorf("%d bytes audited, want %d", d.Stats.AuditBytes, want)
	}
	_, what := w.vm.TakeReads("vda")
	if want := int64(unit + grain); what.Bytes() != want || d.Stats.ReadBytes != want {
		t.Errorf("%d bytes read, stats say %d, want what was written and the one chunk with data: %d", what.Bytes(), d.Stats.ReadBytes, want)
	}
}

// The sample is another in every run, the same for the same seed, and the seed
// is in the log.
func TestAuditSampleIsRandom(t *testing.T) {
	const chunks = 400
	w := memWorld(t, chunks*unit)
	w.fill("vda", chunks)
	w.backUpSparse()
	r := w.mustOpen()
	defer r.Close()
	var log bytes.Buffer
	sample := func(seed uint64) string {
		t.Helper()
		w.vm.TakeReads("vda")
		o := backup.Options{Repo: r, Now: w.clock.now, Seed: seed, Log: slog.New(slog.NewTextHandler(&log, nil))}
		if res := backup.Run(t.Context(), o, []backup.Job{w.job()})[0]; res.Err != nil {
			t.Fatal(res.Err)
		}
		_, what := w.vm.TakeReads("vda")
		var b strings.Builder
		for _, e := range what.List() {
			b.WriteString(e.String())
		}
		return b.String()
	}
	if first, again := sample(7), sample(7); first != again {
		t.Error("one seed gave two samples")
	}
	if !strings.Contains(log.String(), "seed=7") {
		t.Errorf("the log does not name the seed: %s", log.String())
	}
	seen := map[string]bool{}
	var all extent.Set
	const runs = 60 // together 960 draws from 400 chunks: all but about 9 % are met
	for range runs {
		w.vm.TakeReads("vda")
		o := backup.Options{Repo: r, Now: w.clock.now}
		if res := backup.Run(t.Context(), o, []backup.Job{w.job()})[0]; res.Err != nil {
			t.Fatal(res.Err)
		}
		_, what := w.vm.TakeReads("vda")
		all = all.Union(what)
		seen[what.List()[0].String()] = true
	}
	if met := all.Bytes() / unit; met < chunks*3/4 {
		t.Errorf("%d runs met only %d of %d chunks", runs, met, chunks)
	}
	if len(seen) < runs/6 {
		t.Errorf("only %d different first chunks in %d runs", len(seen), runs)
	}
}

// A chunk that tracking calls unchanged and that became zeros, or the other
// way round, differs too. (Zeros of which the source knows are no secret.)
func TestAuditSeesHoles(t *testing.T) {
	for _, toHole := range []bool{true, false} {
		w := newWorld(t, mem.New())
		w.vm.AddDisk("vda", 2*mib)
		w.vm.Write("vda", 0, noise(1, mib))
		w.backUp()
		w.vm.Lie("vda", extent.Extent{Len: 2 * mib})
		if toHole {
			w.vm.Write("vda", 0, make([]byte, unit))
		} else {
			w.vm.Write("vda", mib, noise(2, 10))
		}
		w.audit = 1
		if res := w.backUp(); len(res.Lied) != 1 {
			t.Errorf("to a hole %v: not seen", toHole)
		}
		w.verify(w.store)
	}
}
