package kvm

import (
	"context"
	"encoding/base64"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/vm"
)

// agentTimeout is for questions that the agent answers from memory.
const agentTimeout = 5 * time.Second

// A readiness is what the guest can be asked to do before a snapshot.
type readiness struct {
	best    vm.Grade // that a freeze would give; crash if it can't be frozen
	why     string   // best is not application
	windows bool
	foreign bool // the guest is frozen, and not by us
}

// ready asks the guest, while it still answers: a frozen agent refuses almost
// everything.
func (d *domain) ready(ctx context.Context, state libvirt.DomainState, def *libvirtxml.Domain, hookAsserted bool) (readiness, error) {
	no := func(why string) (readiness, error) { return readiness{best: vm.GradeCrash, why: why}, nil }
	if state != libvirt.DomainRunning && state != libvirt.DomainBlocked {
		return no("the VM is " + stateWord(state))
	}
	configured, connected := agentState(def)
	if !configured {
		return no("the VM has no channel to a guest agent")
	}
	if !connected {
		return no("the guest agent is not connected")
	}
	var status string
	if err := d.agent(ctx, agentTimeout, "guest-fsfreeze-status", nil, &status); err != nil {
		if e, ok := err.(*agentError); ok && ctx.Err() == nil {
			return no(e.Error())
		}
		return readiness{}, err
	}
	if status == "frozen" {
		return readiness{best: vm.GradeCrash, foreign: true,
			why: "the guest's file systems are frozen, and not by us"}, nil
	}
	var os struct {
		ID string `json:"id"`
	}
	// An agent too old to know is not a Windows agent worth the name.
	if err := d.agent(ctx, agentTimeout, "guest-get-osinfo", nil, &os); err == nil && os.ID == "mswindows" {
		return readiness{best: vm.GradeApplication, windows: true}, nil
	}
	if hookAsserted || d.hasFreezeHook(ctx) {
		return readiness{best: vm.GradeApplication}, nil
	}
	return readiness{best: vm.GradeFilesystem, why: "the guest agent has no freeze hook"}, nil
}

// hasFreezeHook reads the agent's own command line and settings. An agent that
// has a hook fails to freeze when the hook fails, so a freeze that succeeds
// says the rest.
func (d *domain) hasFreezeHook(ctx context.Context) bool {
	line, err := d.readGuestFile(ctx, "/proc/self/cmdline") // the agent opens it, so self is the agent
	if err != nil {
		return false
	}
	hook, config := agentArgs(strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00"))
	if hook {
		return true
	}
	settings, err := d.readGuestFile(ctx, config)
	return err == nil && configHasHook(string(settings))
}

// readGuestFile reads the first 4 KiB of a file in the guest.
func (d *domain) readGuestFile(ctx context.Context, path string) ([]byte, error) {
	var handle int64
	if err := d.agent(ctx, agentTimeout, "guest-file-open", map[string]any{"path": path, "mode": "r"}, &handle); err != nil {
		return nil, err
	}
	defer d.agent(ctx, agentTimeout, "guest-file-close", map[string]any{"handle": handle}, nil)
	var r struct {
		Buf string `json:"buf-b64"`
	}
	if err := d.agent(ctx, agentTimeout, "guest-file-read", map[string]any{"handle": handle, "count": 4096}, &r); err != nil {
		return nil, err
	}
	return base64.StdEncoding.DecodeString(r.Buf)
}
