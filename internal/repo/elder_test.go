package repo

import (
	"testing"

	"github.com/backstay/backstay/internal/blob"
	"github.com/backstay/backstay/internal/blob/mem"
	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo/internal/index"
	"github.com/backstay/backstay/internal/repo/internal/pack"
	"github.com/backstay/backstay/internal/repo/internal/seal"
)

// forge stores a pack with a record for each of ids that has its checksums right
// and no chunk in it, named by an index object or not. It needs no keys.
func forge(t *testing.T, st blob.Store, repo [16]byte, ids []chunk.ID, indexed bool) {
	t.Helper()
	name, bin, err := newID()
	if err != nil {
		t.Fatal(err)
	}
	b := pack.NewBuilder(pack.NewMemory(8<<20), repo, bin)
	w := pack.NewWorker(repo, &seal.Keys{}, 1)
	for i, id := range ids {
		e, rec, err := w.Seal(id, noise(uint64(i), 100), false)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.Append(e, rec); err != nil {
			t.Fatal(err)
		}
	}
	entries := b.Entries()
	_, sum := b.Finish()
	if err := st.Put(bg, packName(sum), b, b.Bytes()); err != nil {
		t.Fatal(err)
	}
	if indexed {
		if err := put(bg, st, indexPrefix+name+"-000000", index.Encode(repo, []index.Pack{indexPack(sum, b.Bytes(), entries)})); err != nil {
			t.Fatal(err)
		}
	}
}

// Whoever can add packs, and has no keys, cannot have good records vacuumed away
// by storing others of the same name; neither beside flat index objects nor
// beside runs, whether the forged pack is indexed or found.
func TestVacuumKeepsTheElder(t *testing.T) {
	for name, o := range map[string]struct{ run, indexed, keyless bool }{
		"flat, indexed": {false, true, true},
		"flat, found":   {false, false, true},
		"run, indexed":  {true, true, true},
		"run, found":    {true, false, true},
		"with keys":     {true, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			st, r := newRepo(t)
			content := noise(1, 20*testChunk)
			p := mustBackup(t, r, "web01", content, nil, nil)
			if o.run {
				gone := mustBackup(t, r, "old", noise(2, 5*testChunk), nil, nil)
				if err := r.DeletePoint(bg, gone.VM, gone.ID); err != nil {
					t.Fatal(err)
				}
				mustVacuum(t, r)
				if len(mustNames(t, st, runPrefix)) == 0 {
					t.Fatal("no run was written")
				}
			}
			var ids []chunk.ID
			for _, c := range refs(t, r, p) {
				ids = append(ids, c.id)
			}
			forge(t, st, r.id, ids, o.indexed)
			v := mustOpen(t, st)
			if o.keyless {
				var err error
				if v, err = OpenKeyless(bg, st); err != nil {
					t.Fatal(err)
				}
				defer v.Close()
			}
			for range 2 {
				if rep, err := v.Vacuum(bg, VacuumOptions{}); err != nil || rep.Revoked > 0 {
					t.Fatalf("%+v, %v", rep, err)
				}
				r = mustOpen(t, st)
				mustRead(t, r, p, content)
			}
			if rep := mustCheck(t, r, CheckOptions{ReadData: true}); len(rep.Findings)+len(rep.Unneeded) > 0 {
				t.Errorf("%+v", rep)
			}
		})
	}
}

// An elder that went bad is no match for the record that a backup stored since,
// whether anybody can see that or only who has keys.
func TestVacuumKeepsTheHealed(t *testing.T) {
	for name, byKeys := range map[string]bool{"checksum": false, "content": true} {
		t.Run(name, func(t *testing.T) {
			st := mem.New()
			mustInit(t, st)
			r := mustOpen(t, st)
			content := noise(1, 8*testChunk)
			var p *point.RestorePoint
			if byKeys {
				// Somebody stored other bytes first, under the ids of this disk.
				var ids []chunk.ID
				for i := range int64(8) {
					ids = append(ids, r.ChunkID(cut(content, i)))
				}
				forge(t, st, r.id, ids, true)
				r = mustOpen(t, st)
				p = mustBackup(t, r, "web01", content, nil, nil)
				if _, err := read(r, p); err == nil {
					t.Fatal("the forged records were not taken for the chunks")
				}
			} else {
				p = mustBackup(t, r, "web01", content, nil, nil)
				flipIn(t, st, largest(t, st), 3)
				if _, err := read(r, p); err == nil {
					t.Fatal("the damage was not found")
				}
				for _, c := range refs(t, r, p) {
					r.distrust(c.id) // a restore ends with the first that is damaged
				}
			}
			for range 20 { // each ends with the first that is wrong
				if _, err := read(r, p); err == nil {
					break
				}
				mustBackup(t, r, "web01", content, nil, nil)
			}
			mustRead(t, r, p, content)
			keyless, err := OpenKeyless(bg, st)
			if err != nil {
				t.Fatal(err)
			}
			defer keyless.Close()
			for range 2 {
				if _, err := keyless.Vacuum(bg, VacuumOptions{}); err != nil {
					t.Fatal(err)
				}
				mustRead(t, mustOpen(t, st), p, content)
			}
		})
	}
}
