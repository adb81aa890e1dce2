package kvm

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/backstay/backstay/internal/fault"
)

// A domain is one VM on one connection.
type domain struct {
	*conn
	name string
	id   libvirt.UUID
}

func (d *domain) uuid() string { return formatUUID([16]byte(d.id)) }

// lookup finds a VM by its name.
func (c *conn) lookup(ctx context.Context, name string) (*domain, error) {
	var dom libvirt.Domain
	err := c.again(ctx, callTimeout, func(l *libvirt.Libvirt) (err error) {
		dom, err = l.DomainLookupByName(name)
		return err
	})
	if code(err) == libvirt.ErrNoDomain {
		return nil, fmt.Errorf("VM %q at %s: %w", name, c.uri.Redacted(), fault.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return &domain{c, dom.Name, dom.UUID}, nil
}

// call runs f on the VM as it is now.
func (d *domain) call(ctx context.Context, limit time.Duration, f func(l *libvirt.Libvirt, dom libvirt.Domain) error) error {
	return d.named(d.again(ctx, limit, func(l *libvirt.Libvirt) error {
		return f(l, libvirt.Domain{Name: d.name, UUID: d.id, ID: -1})
	}))
}

// once is call for what must not be repeated if libvirt goes away.
func (d *domain) once(ctx context.Context, limit time.Duration, f func(l *libvirt.Libvirt, dom libvirt.Domain) error) error {
	return d.named(d.do(ctx, limit, func(l *libvirt.Libvirt) error {
		return f(l, libvirt.Domain{Name: d.name, UUID: d.id, ID: -1})
	}))
}

func (d *domain) named(err error) error {
	if code(err) == libvirt.ErrNoDomain {
		return fmt.Errorf("VM %q: %w", d.name, fault.ErrNotFound)
	}
	return err
}

// state is the VM's state and libvirt's reason for it.
func (d *domain) state(ctx context.Context) (state libvirt.DomainState, reason int32, err error) {
	err = d.call(ctx, callTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) error {
		s, r, err := l.DomainGetState(dom, 0)
		state, reason = libvirt.DomainState(s), r
		return err
	})
	return state, reason, err
}

// active says whether the VM has a QEMU.
func (d *domain) active(ctx context.Context) (bool, error) {
	var n int32
	err := d.call(ctx, callTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) (err error) {
		n, err = l.DomainIsActive(dom)
		return err
	})
	return n == 1, err
}

// now says whether the VM has a QEMU, with its state and libvirt's reason for
// it. The numbers of reasons mean another thing in every state: what was asked
// before and after a VM stopped must not be mixed.
func (d *domain) now(ctx context.Context) (on bool, state libvirt.DomainState, reason int32, err error) {
	return steady(ctx, 200*time.Millisecond, func() (bool, libvirt.DomainState, int32, error) {
		on, err := d.active(ctx)
		if err != nil {
			return false, 0, 0, err
		}
		state, reason, err := d.state(ctx)
		return on, state, reason, err
	})
}

// steady asks until both answers can be of one moment.
func steady(ctx context.Context, pause time.Duration, ask func() (bool, libvirt.DomainState, int32, error)) (on bool, state libvirt.DomainState, reason int32, err error) {
	for range 10 {
		on, state, reason, err = ask()
		if err != nil {
			return false, 0, 0, err
		}
		if state == libvirt.DomainNostate || state == libvirt.DomainCrashed || on == (state != libvirt.DomainShutoff) {
			return on, state, reason, nil
		}
		select {
		case <-ctx.Done():
			return false, 0, 0, ctx.Err()
		case <-time.After(pause):
		}
	}
	return false, 0, 0, fmt.Errorf("it is just being started or stopped: %w", fault.ErrLocked)
}

func stateWord(s libvirt.DomainState) string {
	switch s {
	case libvirt.DomainRunning, libvirt.DomainBlocked:
		return "running"
	case libvirt.DomainPaused:
		return "paused"
	case libvirt.DomainShutdown:
		return "shutting down"
	case libvirt.DomainShutoff:
		return "shut off"
	case libvirt.DomainCrashed:
		return "crashed"
	case libvirt.DomainPmsuspended:
		return "suspended"
	}
	return "unknown"
}

// xml is the domain's definition: as it runs now, or with
// libvirt.DomainXMLInactive as it will start. Never with its secrets.
func (d *domain) xml(ctx context.Context, flags libvirt.DomainXMLFlags) (string, *libvirtxml.Domain, error) {
	var text string
	err := d.call(ctx, callTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) (err error) {
		text, err = l.DomainGetXMLDesc(dom, flags)
		return err
	})
	if err != nil {
		return "", nil, err
	}
	var x libvirtxml.Domain
	if err := x.Unmarshal(text); err != nil {
		return "", nil, fmt.Errorf("definition of VM %q: %w", d.name, err)
	}
	return text, &x, nil
}

// size is a disk's virtual size in bytes.
func (d *domain) size(ctx context.Context, disk string) (int64, error) {
	var n uint64
	err := d.call(ctx, callTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) (err error) {
		_, n, _, err = l.DomainGetBlockInfo(dom, disk, 0)
		return err
	})
	return int64(n), err
}

// monitor asks QEMU itself; libvirt marks the VM as tainted for it, which has
// no effect but a line in its log.
func (d *domain) monitor(ctx context.Context, command string, args map[string]any, into any) error {
	ask, err := json.Marshal(map[string]any{"execute": command, "arguments": args})
	if err != nil {
		return err
	}
	var reply string
	err = d.call(ctx, callTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) (err error) {
		reply, err = l.QEMUDomainMonitorCommand(dom, string(ask), 0)
		return err
	})
	if err != nil {
		return err
	}
	if err := parseQMP(reply, into); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// nodes are QEMU's block nodes by name.
func (d *domain) nodes(ctx context.Context) (map[string]node, error) {
	var list []node
	if err := d.monitor(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &list); err != nil {
		return nil, err
	}
	m := make(map[string]node, len(list))
	for _, n := range list {
		m[n.Name] = n
	}
	return m, nil
}

// checkpoints are the names of those that libvirt has, whoever made them.
func (d *domain) checkpoints(ctx context.Context) (map[string]bool, error) {
	m := map[string]bool{}
	err := d.call(ctx, callTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) error {
		list, _, err := l.DomainListAllCheckpoints(dom, 1, 0)
		for _, c := range list {
			m[c.Name] = true
		}
		return err
	})
	return m, err
}

// job says what libvirt is doing with the VM, "" for nothing.
func (d *domain) job(ctx context.Context) (string, error) {
	what := ""
	err := d.call(ctx, callTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) error {
		typ, params, err := l.DomainGetJobStats(dom, 0)
		what = ""
		if err != nil || libvirt.DomainJobType(typ) == libvirt.DomainJobNone {
			return err
		}
		what = "a job"
		for _, p := range params {
			if n, ok := p.Value.I.(int32); ok && p.Field == libvirt.DomainJobOperationStr {
				what = operation(libvirt.DomainJobOperation(n))
			}
		}
		return nil
	})
	if code(err) == libvirt.ErrOperationInvalid { // shut off
		return "", nil
	}
	return what, err
}

func operation(o libvirt.DomainJobOperation) string {
	switch o {
	case libvirt.DomainJobOperationStrBackup:
		return "a backup"
	case libvirt.DomainJobOperationStrMigrationIn, libvirt.DomainJobOperationStrMigrationOut:
		return "a migration"
	case libvirt.DomainJobOperationStrSave, libvirt.DomainJobOperationStrRestore:
		return "a save or restore"
	case libvirt.DomainJobOperationStrSnapshot, libvirt.DomainJobOperationStrSnapshotRevert, libvirt.DomainJobOperationStrSnapshotDelete:
		return "a snapshot"
	case libvirt.DomainJobOperationStrDump:
		return "a dump"
	}
	return "a job"
}

// backupSocket is the socket of the pull backup that runs, "" for none.
func (d *domain) backupSocket(ctx context.Context) (string, error) {
	var text string
	err := d.call(ctx, callTimeout, func(l *libvirt.Libvirt, dom libvirt.Domain) (err error) {
		text, err = l.DomainBackupGetXMLDesc(dom, 0)
		return err
	})
	switch code(err) {
	case libvirt.ErrNoDomainBackup, libvirt.ErrOperationInvalid:
		return "", nil
	}
	if err != nil {
		return "", err
	}
	var b struct {
		XMLName xml.Name `xml:"domainbackup"`
		Server  struct {
			Socket string `xml:"socket,attr"`
		} `xml:"server"`
	}
	if err := xml.Unmarshal([]byte(text), &b); err != nil {
		return "", fmt.Errorf("backup job of VM %q: %w", d.name, err)
	}
	return b.Server.Socket, nil
}

// agent asks the guest agent; limit is rounded up to seconds. Whatever goes
// wrong is an agentError, but for a libvirt that went away.
func (d *domain) agent(ctx context.Context, limit time.Duration, command string, args map[string]any, into any) error {
	q := map[string]any{"execute": command}
	if args != nil {
		q["arguments"] = args
	}
	ask, err := json.Marshal(q)
	if err != nil {
		return err
	}
	seconds := int32((limit + time.Second - 1) / time.Second)
	var reply libvirt.OptString
	// libvirt first synchronizes with the agent, for which it waits 5 s more.
	err = d.once(ctx, limit+10*time.Second, func(l *libvirt.Libvirt, dom libvirt.Domain) (err error) {
		reply, err = l.QEMUDomainAgentCommand(dom, string(ask), seconds, 0)
		return err
	})
	if code(err) != 0 || errors.Is(err, context.DeadlineExceeded) {
		return &agentError{command, err}
	}
	if err != nil {
		return err
	}
	if len(reply) == 0 || into == nil {
		return nil
	}
	var r struct {
		Return json.RawMessage `json:"return"`
	}
	if err := json.Unmarshal([]byte(reply[0]), &r); err != nil {
		return &agentError{command, err}
	}
	if err := json.Unmarshal(r.Return, into); err != nil {
		return &agentError{command, err}
	}
	return nil
}

// An agentError is what the guest agent, or libvirt for it, had to complain of.
type agentError struct {
	command string
	err     error
}

func (e *agentError) Error() string {
	text := e.err.Error()
	if code(e.err) == libvirt.ErrAgentUnresponsive && strings.Contains(text, "not connected") {
		return "the guest agent is not connected"
	}
	return "guest agent: " + e.command + ": " + text
}

func (e *agentError) Unwrap() error { return e.err }
