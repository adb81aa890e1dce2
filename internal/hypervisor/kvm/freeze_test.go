//go:build linux && amd64

package kvm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/vm"
)

// patient is a freeze limit that a busy machine under test does not reach.
const patient = 2 * time.Minute

// Somebody else's freeze is reported, and left alone.
func TestFrozenBySomebodyElse(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	h.ok(h.web.Freeze(h.ctx))
	defer h.web.Thaw(context.Background())
	for _, c := range []vm.Consistency{vm.RequireApplication, vm.Filesystem} {
		if _, err := h.begin(h.Driver, repoA, nil, hypervisor.Options{Consistency: c}); !errors.Is(err, fault.ErrConsistency) {
			t.Errorf("%s: %v", c, err)
		}
		h.wantClean()
	}
	a := h.backup(repoA, nil, hypervisor.Options{Consistency: vm.PreferApplication})
	if w := strings.Join(a.Warnings(), "; "); a.Grade() != vm.GradeCrash || !strings.Contains(w, "frozen, and not by us") {
		t.Errorf("grade %s, warnings %s", a.Grade(), w)
	}
	if frozen, err := h.web.Frozen(h.ctx); err != nil || !frozen {
		t.Errorf("the guest was thawed, and that was not ours to do: %v", err)
	}
}

// Without a hook a freeze is worth less, and without an agent there is none.
func TestAgentWithoutHookAndNoAgent(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	defer func() { // the next test wants the agent that the guest booted with
		h.ok(h.web.Destroy(h.ctx))
	}()
	first, err := h.web.Shell(h.ctx, "echo $PPID")
	h.ok(err)
	// The agent may be gone before it has said how the script went.
	h.web.Shell(h.ctx, `(sleep 0.3; killall qemu-ga; sleep 1
		/usr/sbin/qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run -f /run/qga.pid -l /run/qga.log) </dev/null >/dev/null 2>&1 &`)
	h.wait("the other agent", func() bool {
		agent, err := h.web.Shell(h.ctx, "echo $PPID")
		return err == nil && agent != first
	})
	a := h.backup(repoA, nil, hypervisor.Options{Consistency: vm.Filesystem, FreezeLimit: patient})
	if a.Grade() != vm.GradeFilesystem || a.FrozenFor() <= 0 || len(a.Warnings()) != 0 {
		t.Errorf("grade %s, frozen for %v, warnings %q", a.Grade(), a.FrozenFor(), a.Warnings())
	}
	b := h.backup(repoA, nil, hypervisor.Options{Consistency: vm.PreferApplication, FreezeLimit: patient})
	if w := strings.Join(b.Warnings(), "; "); b.Grade() != vm.GradeFilesystem || !strings.Contains(w, "filesystem-consistent only: the guest agent has no freeze hook") {
		t.Errorf("grade %s, warnings %s", b.Grade(), w)
	}
	h.wantClean(b.checkpoint())
	if _, err := h.begin(h.Driver, repoA, nil, hypervisor.Options{Consistency: vm.RequireApplication}); !errors.Is(err, fault.ErrConsistency) || !strings.Contains(err.Error(), "no freeze hook") {
		t.Errorf("required application: %v", err)
	}
	// The word of an administrator counts where the agent's can't be had.
	sworn := h.open(t.TempDir())
	sworn.freezeHook = true
	c, err := h.begin(sworn, repoA, nil, hypervisor.Options{Consistency: vm.RequireApplication, FreezeLimit: patient})
	h.ok(err)
	if c.Grade() != vm.GradeApplication {
		t.Errorf("grade %s", c.Grade())
	}
	h.ok(c.Abort(h.ctx))

	h.web.Shell(h.ctx, `(sleep 0.3; killall qemu-ga) </dev/null >/dev/null 2>&1 &`)
	h.wait("the agent to go", func() bool {
		text, err := h.web.DomainXML(h.ctx)
		return err == nil && strings.Contains(text, "state='disconnected'")
	})
	for _, c := range []vm.Consistency{vm.RequireApplication, vm.Filesystem} {
		if _, err := h.begin(h.Driver, repoA, nil, hypervisor.Options{Consistency: c}); !errors.Is(err, fault.ErrConsistency) || !strings.Contains(err.Error(), "the guest agent is not connected") {
			t.Errorf("%s: %v", c, err)
		}
	}
	d := h.backup(repoA, nil, hypervisor.Options{Consistency: vm.PreferApplication})
	if w := strings.Join(d.Warnings(), "; "); d.Grade() != vm.GradeCrash || w != "the restore point is crash-consistent only: the guest agent is not connected" {
		t.Errorf("grade %s, warnings %s", d.Grade(), w)
	}
	h.wantClean(d.checkpoint())
}

// The guest is thawed when the limit is over, whatever libvirt does meanwhile.
func TestFreezeLimit(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	h.afterFreeze = func() { // long enough for the thaw, even on a busy machine
		for h.ctx.Err() == nil {
			if frozen, err := h.web.Frozen(h.ctx); err == nil && !frozen {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Error("nobody thawed the guest")
	}
	limit := 5 * time.Second
	a := h.backup(repoA, nil, hypervisor.Options{Consistency: vm.PreferApplication, FreezeLimit: limit})
	for strings.Contains(strings.Join(a.Warnings(), "; "), errNotFrozen.Error()) && limit < patient { // by a machine that is too busy
		limit *= 3
		a = h.backup(repoA, nil, hypervisor.Options{Consistency: vm.PreferApplication, FreezeLimit: limit})
	}
	if w := strings.Join(a.Warnings(), "; "); a.Grade() != vm.GradeCrash || !strings.Contains(w, fmt.Sprint("freeze limit of ", limit)) {
		t.Errorf("grade %s, warnings %s", a.Grade(), w)
	}
	if _, err := h.begin(h.Driver, repoA, nil, hypervisor.Options{Consistency: vm.RequireApplication, FreezeLimit: limit}); !errors.Is(err, fault.ErrConsistency) {
		t.Errorf("required application: %v", err)
	}
	h.wantClean(a.checkpoint())

	// A limit that freezing itself exceeds.
	h.afterFreeze = nil
	b := h.backup(repoA, nil, hypervisor.Options{Consistency: vm.PreferApplication, FreezeLimit: time.Millisecond})
	// libvirt gives the agent a second, which on a busy machine is too short.
	if w := strings.Join(b.Warnings(), "; "); b.Grade() != vm.GradeCrash || !strings.Contains(w, errNotFrozen.Error()) ||
		!strings.Contains(w, "the limit is 1ms") && !strings.Contains(w, "agent is not responding") {
		t.Errorf("grade %s, warnings %s", b.Grade(), w)
	}
	h.thawed()
}

// Killed while the guest stands still, we leave it to the watchdog, and all
// else to the next run.
func TestKilledWhileFrozen(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	kill := h.victim("frozen", a)
	if frozen, err := h.web.Frozen(h.ctx); err != nil || !frozen {
		t.Fatalf("the guest is not frozen: %v", err)
	}
	kill()
	start := time.Now()
	h.wait("the watchdog", func() bool {
		frozen, err := h.web.Frozen(h.ctx)
		return err == nil && !frozen
	})
	t.Logf("thawed after %v", time.Since(start))
	b := h.backup(repoA, a, hypervisor.Options{})
	h.wantModes(b, incremental+rawAgain)
	h.wantClean(b.checkpoint())
}

// A freeze of ours that outlived even its watchdog is ended by the next run.
func TestOurOwnFreezeLeft(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	h.ok(h.web.Freeze(h.ctx))
	defer h.web.Thaw(context.Background())
	j, err := h.openJournal()
	h.ok(err)
	r, err := j.Begin(h.dom().uuid(), newUUID())
	h.ok(err)
	h.ok(r.Note(freezeEntry(h.dom(), time.Now())))
	h.ok(r.Close())
	a := h.backup(repoA, nil, hypervisor.Options{Consistency: vm.RequireApplication, FreezeLimit: patient})
	if w := strings.Join(a.Warnings(), "; "); !strings.Contains(w, "thawed the guest, which was still frozen") {
		t.Errorf("warnings %s", w)
	}
	h.thawed()
	h.wantClean(a.checkpoint())

	// One that we may have left long ago is somebody else's by now.
	h.ok(h.web.Freeze(h.ctx))
	r, err = j.Begin(h.dom().uuid(), newUUID())
	h.ok(err)
	h.ok(r.Note(freezeEntry(h.dom(), time.Now().Add(-time.Hour))))
	h.ok(r.Close())
	b := h.backup(repoA, a, hypervisor.Options{Consistency: vm.PreferApplication})
	if w := strings.Join(b.Warnings(), "; "); b.Grade() != vm.GradeCrash || !strings.Contains(w, "left the guest frozen") {
		t.Errorf("grade %s, warnings %s", b.Grade(), w)
	}
	if frozen, err := h.web.Frozen(h.ctx); err != nil || !frozen {
		t.Errorf("the guest was thawed, and that was not ours to do: %v", err)
	}
}

// Killed while it reads, a run leaves a job, scratch files and a checkpoint,
// on a VM that runs and on one that is off.
func TestKilledWhileReading(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	h.victim("reading", a)()
	b := h.backup(repoA, a, hypervisor.Options{})
	h.wantModes(b, incremental+rawAgain)
	w := strings.Join(b.Warnings(), "; ")
	for _, want := range []string{"an earlier run was interrupted", "ended a backup job", "removed scratch files", "deleted checkpoint backstay-aaaaaaaa-"} {
		if !strings.Contains(w, want) {
			t.Errorf("warnings %q lack %q", w, want)
		}
	}
	h.wantClean(b.checkpoint())

	// Of another repository's dead run the job is ended, and the checkpoint is
	// left: its restore point may be durable.
	kill := h.victimOf(repoB, "reading", nil)
	kill()
	c := h.backup(repoA, b, hypervisor.Options{})
	h.wantModes(c, incremental+rawAgain)
	list, err := h.dom().checkpoints(h.ctx)
	h.ok(err)
	if len(list) != 2 {
		t.Errorf("checkpoints %v", list)
	}
	d := h.backup(repoB, nil, hypervisor.Options{})
	h.wantClean(c.checkpoint(), d.checkpoint())
	h.ok(h.ResetTracking(h.ctx, "web01", repoB))

	h.ok(h.web.Shutdown(h.ctx))
	h.victim("reading", c)()
	e := h.backup(repoA, c, hypervisor.Options{})
	h.wantModes(e, incremental+rawAgain)
	h.wantClean(c.checkpoint())
}

// A run that died after its restore point was durable, and before Commit, has
// left the base of the next.
func TestKilledBeforeCommit(t *testing.T) {
	h := newHost(t)
	h.up()
	h.reset()
	a := h.backup(repoA, nil, hypervisor.Options{})
	b, err := h.begin(h.Driver, repoA, a, hypervisor.Options{})
	h.ok(err)
	h.read(b, a)
	s := b.Session.(*session) // the process ends here, as far as others can tell
	s.watching()
	s.hangUp()
	s.lock.Unlock()
	h.write("vdb", 1<<20, 4096, 16)
	c := h.backup(repoA, b, hypervisor.Options{})
	h.wantModes(c, incremental+rawAgain)
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	h.wantClean(c.checkpoint())
}

func (h *host) thawed() {
	h.Helper()
	if frozen, err := h.web.Frozen(h.ctx); err != nil || frozen {
		h.Errorf("the guest is frozen: %v", err)
	}
}

// victimEnv tells a copy of the test program to begin a backup and wait for
// its death.
const victimEnv = "BACKSTAY_TEST_VICTIM"

type victimOrder struct {
	Source, StateDir, ScratchDir, Repo, At string
	Previous                               map[vm.DiskID]hypervisor.PreviousDisk
}

func victim(text string) {
	var o victimOrder
	err := json.Unmarshal([]byte(text), &o)
	uri, name, err2 := ParseSource(o.Source)
	if err = errors.Join(err, err2); err != nil {
		panic(err)
	}
	ctx := context.Background()
	d, err := Open(ctx, Options{URI: uri, StateDir: o.StateDir, ScratchDir: o.ScratchDir})
	if err != nil {
		panic(err)
	}
	forever := func() {
		fmt.Println(o.At)
		time.Sleep(time.Hour)
	}
	ho := hypervisor.Options{RepoID: o.Repo, Previous: o.Previous, Consistency: vm.Crash, FreezeLimit: time.Minute}
	if o.At == "frozen" {
		d.afterFreeze, ho.Consistency = forever, vm.RequireApplication
	}
	if _, err := d.Begin(ctx, name, ho); err != nil {
		panic(err)
	}
	forever()
}

func (h *host) victim(at string, prev *backup) (kill func()) {
	h.Helper()
	return h.victimOf(repoA, at, prev)
}

// victimOf starts a victim and waits until it is at the place of its death.
func (h *host) victimOf(repo, at string, prev *backup) (kill func()) {
	h.Helper()
	o := victimOrder{Source: h.lab.KVM("web01"), StateDir: h.stateDir, ScratchDir: h.scratchDir, Repo: repo, At: at}
	if prev != nil {
		o.Previous = prev.ids
	}
	text, err := json.Marshal(o)
	h.ok(err)
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), victimEnv+"="+string(text))
	cmd.Stderr = h.Output()
	out, err := cmd.StdoutPipe()
	h.ok(err)
	h.ok(cmd.Start())
	kill = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	h.Cleanup(kill)
	if line, err := bufio.NewReader(out).ReadString('\n'); strings.TrimSpace(line) != at {
		h.Fatalf("the victim said %q: %v", line, err)
	}
	return kill
}
