package journal_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/journal"
)

func open(t *testing.T, dir string) *journal.Journal {
	t.Helper()
	j, err := journal.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func note(t *testing.T, r *journal.Run, kind, name string) {
	t.Helper()
	if err := r.Note(journal.Entry{Kind: kind, Name: name, Data: map[string]string{"k": "v"}}); err != nil {
		t.Fatal(err)
	}
}

// What a dead run had noted and not undone is found by the next one.
func TestLeftoversAreFound(t *testing.T) {
	dir := t.TempDir()
	r, err := open(t, dir).Begin("m1", "r1")
	if err != nil {
		t.Fatal(err)
	}
	note(t, r, "checkpoint", "a")
	note(t, r, "scratch", "b")
	note(t, r, "freeze", "c")
	if err := r.Done("scratch", "b"); err != nil {
		t.Fatal(err)
	}
	// r is abandoned, as a kill does.
	runs, err := open(t, dir).Runs("m1")
	if err != nil || len(runs) != 1 {
		t.Fatalf("%d runs, %v; want 1", len(runs), err)
	}
	got := runs[0].Open()
	if len(got) != 2 || got[0].Name != "a" || got[1].Name != "c" || got[0].Data["k"] != "v" || runs[0].ID != "r1" {
		t.Errorf("left behind %v", got)
	}
	if other, _ := open(t, dir).Runs("m"); len(other) != 0 {
		t.Errorf("a machine with a shorter name was given %d runs", len(other))
	}
	if all, err := open(t, dir).Machines(); err != nil || len(all) != 1 || all[0] != "m1" {
		t.Errorf("machines %v, %v", all, err)
	}
	for _, e := range got {
		if err := runs[0].Done(e.Kind, e.Name); err != nil {
			t.Fatal(err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) != 0 {
		t.Errorf("files left after the last thing was undone: %v", left)
	}
}

// A power cut tears the line that was being written. Its thing was not made.
func TestTornLastLine(t *testing.T) {
	dir := t.TempDir()
	r, _ := open(t, dir).Begin("m1", "r1")
	note(t, r, "checkpoint", "a")
	note(t, r, "checkpoint", "b")
	name := filepath.Join(dir, "m1_r1.journal")
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	first := len(whole) / 2 // both lines are equally long
	for n := first; n < len(whole)-1; n++ {
		if err := os.WriteFile(name, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		runs, err := open(t, dir).Runs("m1")
		if err != nil || len(runs) != 1 || len(runs[0].Open()) != 1 {
			t.Fatalf("cut to %d of %d bytes: %v, %v", n, len(whole), runs, err)
		}
		// What is written behind a torn line must be readable again.
		note(t, runs[0], "checkpoint", "c")
		runs, err = open(t, dir).Runs("m1")
		if err != nil || len(runs[0].Open()) != 2 {
			t.Fatalf("cut to %d bytes and gone on: %v, %v", n, runs, err)
		}
	}
}

func TestDamageInTheMiddle(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "m1_r1.journal"), []byte("{\"kind\":\n{\"kind\":\"a\",\"name\":\"b\"}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, dir).Runs("m1"); !errors.Is(err, fault.ErrCorrupt) {
		t.Errorf("got %v, want corrupt data", err)
	}
}

func TestNothingNotedLeavesNoFile(t *testing.T) {
	dir := t.TempDir()
	j := open(t, dir)
	r, _ := j.Begin("m1", "r1")
	if err := r.Clear(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left %v", left)
	}
	for _, bad := range []string{"", "a/b", "..", "a_b"} {
		if _, err := j.Begin(bad, "r1"); err == nil {
			t.Errorf("%q was taken for a machine's name", bad)
		}
	}
}
