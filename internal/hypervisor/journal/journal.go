// Package journal remembers what a driver is about to make on a host, so that
// a later run can take it away if this one dies.
//
// There is one file per run, and one line per thing. A line is on disk before
// the thing is made, so whatever exists is written down; what is written down
// may not exist, and whoever reaps must not mind. docs/design/journal.md says
// why it is so plain.
package journal

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/backstay/backstay/internal/fault"
)

// An Entry is one thing on a host. What Kind, Name and Data mean is the
// driver's affair.
type Entry struct {
	Kind string            `json:"kind"` // "checkpoint", "scratch", "freeze", …
	Name string            `json:"name"`
	Data map[string]string `json:"data,omitempty"`
}

// A Journal is a directory of runs. Two processes may share one as long as
// each machine's runs belong to one of them at a time; drivers hold a lock for that.
type Journal struct{ dir string }

// Open finds the journal in dir and creates what is missing.
func Open(dir string) (*Journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &Journal{dir}, nil
}

const suffix = ".journal"

// maxLine bounds a line in bytes; ours are a few hundred.
const maxLine = 1 << 20

type line struct {
	Entry
	Done bool `json:"done,omitempty"` // the thing is gone again
}

// A Run is one session's file. Its methods are safe for concurrent use.
type Run struct {
	Machine string // whose things these are
	ID      string // unique among the machine's runs

	mu   sync.Mutex
	path string
	f    *os.File // nil until something is noted
	open []Entry
}

func fileName(machine, id string) (string, error) {
	for _, s := range []string{machine, id} {
		if s == "" || strings.ContainsFunc(s, func(r rune) bool {
			return !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '-')
		}) {
			return "", fmt.Errorf("journal: %q does not do for a file name", s)
		}
	}
	return machine + "_" + id + suffix, nil
}

// Begin makes a new run of machine. Both names consist of letters, digits and
// hyphens. Nothing is written until something is noted.
func (j *Journal) Begin(machine, id string) (*Run, error) {
	name, err := fileName(machine, id)
	if err != nil {
		return nil, err
	}
	return &Run{Machine: machine, ID: id, path: filepath.Join(j.dir, name)}, nil
}

// Runs are the runs of machine that left something behind. A torn last line is
// no entry: its thing was never made. Damage elsewhere is fault.ErrCorrupt.
func (j *Journal) Runs(machine string) ([]*Run, error) {
	list, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var runs []*Run
	for _, d := range list {
		id, ok := strings.CutPrefix(d.Name(), machine+"_")
		if id, found := strings.CutSuffix(id, suffix); ok && found {
			r, err := read(filepath.Join(j.dir, d.Name()))
			if err != nil {
				return nil, err
			}
			r.Machine, r.ID = machine, id
			runs = append(runs, r)
		}
	}
	return runs, nil
}

// Machines are those of which a run left something behind.
func (j *Journal) Machines() ([]string, error) {
	list, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var out []string
	for _, d := range list {
		name, ok := strings.CutSuffix(d.Name(), suffix)
		machine, _, found := strings.Cut(name, "_")
		if ok && found && !slices.Contains(out, machine) {
			out = append(out, machine)
		}
	}
	return out, nil
}

func read(path string) (*Run, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	defer f.Close()
	r := &Run{path: path}
	s := bufio.NewScanner(f)
	s.Buffer(nil, maxLine)
	var bad error
	for n := 1; s.Scan(); n++ {
		if bad != nil { // only the last line can be torn
			return nil, bad
		}
		var l line
		if err := parse(s.Bytes(), &l); err != nil {
			bad = fault.Corrupt("journal "+path, -1, "line %d: %v", n, err)
			continue
		}
		r.apply(l)
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	return r, nil
}

// parse reads a line, and one whose beginning is what is left of a torn one:
// an older version wrote on behind that.
func parse(b []byte, l *line) error {
	err := json.Unmarshal(b, l)
	if err == nil {
		return nil
	}
	if at := bytes.LastIndex(b, []byte(`{"kind":`)); at > 0 {
		var whole line
		if json.Unmarshal(b[at:], &whole) == nil {
			*l = whole
			return nil
		}
	}
	return err
}

func (r *Run) apply(l line) {
	same := func(e Entry) bool { return e.Kind == l.Kind && e.Name == l.Name }
	r.open = slices.DeleteFunc(r.open, same)
	if !l.Done {
		r.open = append(r.open, l.Entry)
	}
}

// Open are the entries that are not done, oldest first.
func (r *Run) Open() []Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.open)
}

// Note writes e down. When it returns nil, e survives a power cut, and the
// thing may be made.
func (r *Run) Note(e Entry) error { return r.add(line{Entry: e}) }

// Done says that the thing is gone. When the last one is, so is the run.
func (r *Run) Done(kind, name string) error {
	if err := r.add(line{Entry: Entry{Kind: kind, Name: name}, Done: true}); err != nil {
		return err
	}
	if len(r.Open()) == 0 {
		return r.Clear()
	}
	return nil
}

func (r *Run) add(l line) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.f == nil {
		if err := r.start(); err != nil {
			return fmt.Errorf("journal: %w", err)
		}
	}
	b, err := json.Marshal(l)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	_, err = r.f.Write(append(b, '\n'))
	if err == nil {
		err = r.f.Sync()
	}
	if err != nil {
		// Half a line may be there now, and nothing must be written behind it:
		// the next line begins with a new file.
		r.f.Close()
		r.f = nil
		return fmt.Errorf("journal: %w", err)
	}
	r.apply(l)
	return nil
}

// start opens the file with a fresh line to write on: what a crash left
// behind is written anew without its torn end, then renamed into place.
func (r *Run) start() error {
	var b bytes.Buffer
	for _, e := range r.open {
		j, err := json.Marshal(line{Entry: e})
		if err != nil {
			return err
		}
		b.Write(j)
		b.WriteByte('\n')
	}
	tmp := r.path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b.Bytes())
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(tmp, r.path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(r.path))
	}
	if err != nil {
		return err
	}
	r.f, err = os.OpenFile(r.path, os.O_WRONLY|os.O_APPEND, 0)
	return err
}

// Clear forgets the run: all its things are gone, or are meant to stay. It may
// be called twice.
func (r *Run) Clear() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open = nil
	if r.f != nil {
		r.f.Close()
		r.f = nil
	}
	if err := os.Remove(r.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// Close lets go of the file and leaves what is written.
func (r *Run) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.f == nil {
		return nil
	}
	err := r.f.Close()
	r.f = nil
	return err
}
