package hyperv

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/backstay/backstay/internal/wsman"
	"github.com/backstay/backstay/sim/hyperv/host"
)

// rehearse rehearses a restore of web01, whoever agrees.
func (l *restoreLab) rehearse(ctx context.Context) (RestoreRehearsal, []string, error) {
	var steps []string
	r, err := l.driver().RehearseRestore(ctx, "web01", func(RestorePlan) error { return nil }, func(s string) { steps = append(steps, s) })
	return r, steps, err
}

// A rehearsal does all that a restore does, leaves nothing of it, and says
// beforehand what it will make.
func TestRehearseRestore(t *testing.T) {
	l := newRestoreLab(t)
	before := l.picture()
	l.arm(0, false, nil)
	var plan RestorePlan
	asked := 0
	r, err := l.driver().RehearseRestore(t.Context(), "web01", func(p RestorePlan) error {
		plan, asked = p, len(l.log)
		if after := strings.Join(l.log, " "); strings.Contains(after, "DefineSystem") || strings.Contains(after, "mkdir") {
			t.Errorf("before anybody agreed: %s", after)
		}
		return nil
	}, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	log := l.log[asked:]
	for what, want := range map[string]int{"DefineSystem": 1, "ImportSystemDefinition": 3, "ValidatePlannedSystem": 2, "RealizePlannedSystem": 1, "DestroySystem": 3,
		"RequestStateChange": 0, "CreateSnapshot": 0} {
		if n := strings.Count(strings.Join(log, "\n")+"\n", what+"\n"); n != want {
			t.Errorf("%s was asked for %d times, want %d", what, n, want)
		}
	}
	if plan.VM != "web01" || plan.Disks != 2 || !strings.HasPrefix(plan.Defined, rehearsal) || !strings.HasPrefix(plan.Imported, rehearsal) || plan.Defined == plan.Imported ||
		!slices.Contains(plan.Folders, r.Folder) || len(r.Said) > 0 {
		t.Errorf("%+v, %+v", plan, r)
	}
	if after := l.picture(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// Nothing is made of which its owner did not hear, or to which he does not
// agree.
func TestRehearseRestoreNeedsConsent(t *testing.T) {
	l := newRestoreLab(t)
	before := l.picture()
	no := errors.New("no")
	if _, err := l.driver().RehearseRestore(t.Context(), "web01", func(RestorePlan) error { return no }, func(string) {}); !errors.Is(err, no) {
		t.Error(err)
	}
	if after := l.picture(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// However far it gets before the host goes away for a moment, or the user
// breaks off, nothing of it stays.
func TestRehearseRestoreUndone(t *testing.T) {
	l := newRestoreLab(t)
	every := 110 // each of some 500 takes as long as a whole recording
	if testing.Short() {
		every = 300
	}
	eachOf(t, l, every, func(ctx context.Context) error {
		_, _, err := l.rehearse(ctx)
		return err
	}, func() {})
}

// A host that refuses is one to hear of: what it says is taken down, and all
// goes again.
func TestRehearseRestoreRefused(t *testing.T) {
	fail := func(method string) func(*restoreLab) {
		return func(l *restoreLab) {
			l.host.SetTrouble(func(x *host.Trouble) { x.FailJob = map[string]string{method: "the host does not want to"} })
		}
	}
	for name, c := range map[string]struct {
		trouble func(*restoreLab)
		steps   []string
		said    string
		failed  bool
	}{
		"a damaged definition":      {func(l *restoreLab) { l.definition(func(file string) error { return os.Truncate(file, 100) }) }, []string{StepRestore, StepImport}, "does not take the definition", false},
		"a definition that is gone": {func(l *restoreLab) { l.definition(os.Remove) }, []string{StepRestore}, "", false},
		"what was saved":            {func(l *restoreLab) { l.saved() }, []string{StepRestore}, "", false},
		"RealizePlannedSystem":      {fail("RealizePlannedSystem"), []string{StepRestore, StepImport}, "does not take the definition", false},
		"DefineSystem":              {fail("DefineSystem"), []string{StepRestore, StepImport}, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			l := newRestoreLab(t)
			c.trouble(l)
			before := l.picture()
			r, steps, err := l.rehearse(t.Context())
			if (err != nil) != c.failed || !slices.Equal(steps, c.steps) || !strings.Contains(strings.Join(r.Said, "\n"), c.said) {
				t.Errorf("%q, %q, %v", steps, r.Said, err)
			}
			if after := l.picture(); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

// A host that gives what it imports the identity of the VM that was named: then
// whatever is said of the one is said of the other, and so nothing is.
func TestRehearseRestoreTwins(t *testing.T) {
	l := newRestoreLab(t)
	before := l.picture()
	l.host.SetTrouble(func(x *host.Trouble) { x.KeepIdentity = true })
	r, _, err := l.rehearse(t.Context())
	if err != nil || !strings.Contains(strings.Join(r.Said, "\n"), "has the identity of VM \"web01\"") {
		t.Errorf("%+v, %v", r, err)
	}
	if after := l.picture(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// saved saves the VM.
func (l *restoreLab) saved() {
	l.t.Helper()
	d := l.driver()
	_, list, err := d.systems(l.t.Context())
	if err != nil {
		l.t.Fatal(err)
	}
	for _, state := range []int64{stateRunning, stateSaved} {
		if err := d.setState(l.t.Context(), list[0], state); err != nil {
			l.t.Fatal(err)
		}
	}
}

// definition does something to the file of the VM's definition.
func (l *restoreLab) definition(do func(string) error) {
	l.t.Helper()
	err := filepath.WalkDir(l.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && filepath.Ext(path) == ".vmcx" {
			return do(path)
		}
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// A rehearsal that is killed is tidied by the next run to that host, also when
// its VM had its own name and another disk by then; but not if somebody took it
// for his.
func TestRehearseRestoreKilled(t *testing.T) {
	for name, c := range map[string]struct {
		at    string // request that is the last
		since func(*testing.T, *Driver, system)
		stays bool
	}{
		"while the VM is made":      {at: "AddResourceSettings"},
		"while disks are swapped":   {at: "get " + classDisk},
		"its VM was given a name":   {at: "get " + classDisk, stays: true, since: func(t *testing.T, d *Driver, s system) { called(t, d, s, "ours") }},
		"its VM was started":        {at: "get " + classDisk, stays: true, since: started},
		"its VM is called as we do": {at: "get " + classDisk, since: func(t *testing.T, d *Driver, s system) { called(t, d, s, rehearsal+"other") }},
	} {
		t.Run(name, func(t *testing.T) {
			l := newRestoreLab(t)
			before := l.picture()
			// What is killed asks for nothing more: neither to go on nor to clean up.
			l.arm(0, false, nil)
			l.word, l.dies = c.at, true
			if _, _, err := l.rehearse(t.Context()); err == nil {
				t.Fatal("it was to break")
			}
			l.arm(0, false, nil)
			l.dies, l.dead = false, false
			d := l.driver()
			host, list, err := d.systems(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(list, func(s system) bool { return strings.HasPrefix(s.name, rehearsal) })
			if i < 0 {
				t.Fatal("there is no VM of ours")
			}
			if c.since != nil {
				c.since(t, d, list[i])
				if _, list, err = d.systems(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			said := strings.Join(d.reapRestores(t.Context(), host, list, ""), "\n")
			after := l.picture()
			if strings.Contains(said, "nothing of it is taken back") != c.stays || (after == before) == c.stays {
				t.Errorf("%s\nbefore:\n%s\nafter:\n%s", said, before, after)
			}
		})
	}
}

func called(t *testing.T, d *Driver, s system, name string) {
	t.Helper()
	now, err := d.present(t.Context(), s)
	if err == nil {
		_, err = d.modifySystem(t.Context(), now, func(in *wsman.Instance) { in.Set("ElementName", wsman.Of(name)) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

func started(t *testing.T, d *Driver, s system) {
	t.Helper()
	if err := d.setState(t.Context(), s, stateRunning); err != nil {
		t.Fatal(err)
	}
}
