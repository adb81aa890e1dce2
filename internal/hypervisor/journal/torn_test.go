package journal

import (
	"os"
	"path/filepath"
	"testing"
)

// A full disk tears a line and fails the call. What is noted when there is
// room again can be read.
func TestWriteThatFailsHalfWay(t *testing.T) {
	dir := t.TempDir()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	r, _ := j.Begin("m1", "r1")
	if err := r.Note(Entry{Kind: "checkpoint", Name: "a"}); err != nil {
		t.Fatal(err)
	}
	// Half a line goes through, then the file takes no more.
	if _, err := r.f.WriteString(`{"kind":"scr`); err != nil {
		t.Fatal(err)
	}
	r.f.Close()
	if r.f, err = os.Open(r.path); err != nil {
		t.Fatal(err)
	}
	if err := r.Note(Entry{Kind: "scratch", Name: "b"}); err == nil {
		t.Fatal("a line that could not be written was said to be")
	}
	for _, name := range []string{"c", "d"} {
		if err := r.Note(Entry{Kind: "scratch", Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	runs, err := j.Runs("m1")
	if err != nil || len(runs) != 1 || len(runs[0].Open()) != 3 {
		t.Fatalf("%v, %v", runs, err)
	}
}

// Older versions wrote on behind a torn line.
func TestLineBehindATornOne(t *testing.T) {
	dir := t.TempDir()
	text := `{"kind":"scratch","name":"a"}` + "\n" + `{"kind":"job","na{"kind":"scratch","name":"b"}` + "\n" + `{"kind":"scratch","name":"a","done":true}` + "\n"
	if err := os.WriteFile(filepath.Join(dir, "m1_r1.journal"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	j, _ := Open(dir)
	runs, err := j.Runs("m1")
	if err != nil || len(runs) != 1 || len(runs[0].Open()) != 1 || runs[0].Open()[0].Name != "b" {
		t.Fatalf("%v, %v", runs, err)
	}
}
