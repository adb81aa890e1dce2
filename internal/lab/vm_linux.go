package lab

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/template"
	"time"
)

// A VMDisk is one disk of a VM in the lab.
type VMDisk struct {
	Path   string
	Format string // "" for what the name's end says
	Target string // "" for vda, vdb, … in order
	Serial string
}

// VMOptions say what a VM is to be. The zero value of each field is a guest
// with an agent, its freeze hook and a working workload.
type VMOptions struct {
	Name      string
	Disks     []VMDisk
	MemoryMiB int // 0 for 256

	NoChannel  bool          // no channel for an agent in the VM
	NoAgent    bool          // a channel, but nobody in the guest listens
	NoHook     bool          // an agent without a freeze hook
	NoWorkload bool          // nothing writes by itself
	Every      time.Duration // between two records of the workload; 0 for 20 ms

	// FromDisk boots what the first disk has; without it QEMU is handed the
	// kernel.
	FromDisk bool

	KVM bool // hardware virtualisation; ask ProbeKVM first

	// NVRAM gives the VM UEFI firmware with its variables in this file, made
	// from the firmware's template when the VM starts; "" for a BIOS.
	NVRAM string

	// ExtraDevices is put into the XML's devices as it is.
	ExtraDevices string
}

// A VM is a machine defined in the lab's libvirt.
type VM struct {
	Name string
	lab  *Libvirt
}

// Firmware of Debian's ovmf package.
const (
	uefiCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	uefiVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

var domainXML = template.Must(template.New("domain").Funcs(template.FuncMap{"x": escape}).Parse(`<domain type='{{.Type}}'>
  <name>{{x .Name}}</name>
  <memory unit='MiB'>{{.MemoryMiB}}</memory>
  <vcpu>1</vcpu>
  {{- if .Words}}
  <sysinfo type='smbios'><system><entry name='serial'>{{x .Words}}</entry></system></sysinfo>
  {{- end}}
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
{{- if .NVRAM}}
    <loader readonly='yes' type='pflash'>{{.Code}}</loader>
    <nvram template='{{.Vars}}'>{{x .NVRAM}}</nvram>
{{- end}}
{{- if .FromDisk}}
    <boot dev='hd'/>
{{- else}}
    <kernel>{{x .Kernel}}</kernel>
    <initrd>{{x .Initrd}}</initrd>
    <cmdline>{{x .Cmdline}}</cmdline>
{{- end}}
{{- if .Words}}
    <smbios mode='sysinfo'/>
{{- end}}
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='maximum'/>
  <clock offset='utc'/>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
{{- range .Disks}}
    <disk type='file' device='disk'>
      <driver name='qemu' type='{{x .Format}}' discard='unmap'/>
      <source file='{{x .Path}}'/>
      <target dev='{{x .Target}}' bus='virtio'/>
      {{- if .Serial}}<serial>{{x .Serial}}</serial>{{end}}
    </disk>
{{- end}}
    <serial type='file'><source path='{{x .Serial}}' append='on'/><target port='0'/></serial>
{{- if not .NoChannel}}
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
{{- end}}
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='none'/>
    {{.ExtraDevices}}
  </devices>
</domain>
`))

func escape(s string) (string, error) {
	var b strings.Builder
	err := xml.EscapeText(&b, []byte(s))
	return b.String(), err
}

// Define makes a VM that boots the guest's kernel from its own copy in the
// lab's directory. It does not start it.
func (l *Libvirt) Define(ctx context.Context, g *Guest, o VMOptions) (*VM, error) {
	fail := func(err error) (*VM, error) { return nil, fmt.Errorf("define %s: %w", o.Name, err) }
	dir := l.Path("vm-" + o.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fail(err)
	}
	v := &VM{Name: o.Name, lab: l}
	d := struct {
		VMOptions
		Type, Kernel, Initrd, Cmdline, Words, Serial, Code, Vars string
	}{VMOptions: o, Type: "qemu", Kernel: filepath.Join(dir, "vmlinuz"), Initrd: filepath.Join(dir, "initrd.img"),
		Serial: v.serialFile(), Code: uefiCode, Vars: uefiVars}
	if !o.FromDisk {
		// Copies: libvirt changes the owner of what it hands to QEMU.
		if err := copyFile(g.Kernel, d.Kernel, 0o644); err != nil {
			return fail(err)
		}
		if err := copyFile(g.Initrd, d.Initrd, 0o644); err != nil {
			return fail(err)
		}
	}
	if o.KVM {
		d.Type = "kvm"
	}
	if o.MemoryMiB == 0 {
		d.MemoryMiB = 256
	}
	d.Disks = nil
	for i, disk := range o.Disks {
		if disk.Format == "" {
			disk.Format = strings.TrimPrefix(filepath.Ext(disk.Path), ".")
		}
		if disk.Target == "" {
			disk.Target = "vd" + string(rune('a'+i))
		}
		d.Disks = append(d.Disks, disk)
	}
	d.Cmdline, d.Words = quickBoot, words(o)
	var text bytes.Buffer
	if err := domainXML.Execute(&text, d); err != nil {
		return fail(err)
	}
	file := filepath.Join(dir, "domain.xml")
	if err := os.WriteFile(file, text.Bytes(), 0o644); err != nil {
		return fail(err)
	}
	if _, err := l.Virsh(ctx, "define", file); err != nil {
		return fail(err)
	}
	return v, nil
}

// quickBoot is the part of the kernel's command line that makes an emulated
// machine boot fast.
const quickBoot = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable cryptomgr.notests random.trust_cpu=on"

// words are what init.sh is told.
func words(o VMOptions) string {
	var words []string
	if o.NoAgent {
		words = append(words, "lab.agent=0")
	}
	if o.NoHook {
		words = append(words, "lab.hook=0")
	}
	if o.NoWorkload {
		words = append(words, "lab.workload=0")
	}
	if o.Every > 0 {
		words = append(words, "lab.every="+strconv.FormatInt(max(1, o.Every.Milliseconds()), 10))
	}
	return strings.Join(words, " ")
}

// VM is a handle for a VM that somebody else defined in this libvirt, as a
// restore does.
func (l *Libvirt) VM(name string) *VM { return &VM{Name: name, lab: l} }

func (v *VM) virsh(ctx context.Context, command string, args ...string) (string, error) {
	return v.lab.Virsh(ctx, append([]string{command, v.Name}, args...)...)
}

// Start powers the VM on.
func (v *VM) Start(ctx context.Context) error {
	_, err := v.virsh(ctx, "start")
	return err
}

// Destroy pulls the plug. A VM that is off already is no error.
func (v *VM) Destroy(ctx context.Context) error {
	_, err := v.virsh(ctx, "destroy")
	if err != nil && strings.Contains(err.Error(), "domain is not running") {
		return nil
	}
	return err
}

// Shutdown asks the guest to power off and waits until it has.
func (v *VM) Shutdown(ctx context.Context) error {
	_, err := v.virsh(ctx, "shutdown", "--mode", "agent")
	if err != nil {
		// A guest that is off before its agent has answered did what it was asked.
		late, cancel := context.WithTimeout(ctx, 5*time.Minute)
		defer cancel()
		if v.waitState(late, "shut off") != nil {
			return err
		}
		return nil
	}
	return v.waitState(ctx, "shut off")
}

func (v *VM) waitState(ctx context.Context, want string) error {
	for {
		state, err := v.State(ctx)
		if err != nil || state == want {
			return err
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("%s is %s, not %s: %w", v.Name, state, want, err)
		}
	}
}

// State is in libvirt's words: "running", "shut off", "paused".
func (v *VM) State(ctx context.Context) (string, error) {
	state, err := v.virsh(ctx, "domstate")
	return strings.TrimSpace(state), err
}

// Undefine makes libvirt forget the VM with its checkpoints, its snapshots and
// its NVRAM. The disks stay.
func (v *VM) Undefine(ctx context.Context) error {
	// The VM is off, so checkpoints can lose no more than their metadata.
	_, err := v.virsh(ctx, "undefine", "--nvram", "--checkpoints-metadata", "--snapshots-metadata", "--managed-save")
	return err
}

// Remove destroys and undefines the VM.
func (v *VM) Remove(ctx context.Context) error {
	return errors.Join(v.Destroy(ctx), v.Undefine(ctx))
}

// DomainXML is what libvirt says the VM is, while it runs or while it is off.
func (v *VM) DomainXML(ctx context.Context) (string, error) { return v.virsh(ctx, "dumpxml") }

// Redefine gives the VM another definition: edit is handed the inactive one.
func (v *VM) Redefine(ctx context.Context, edit func(string) string) error {
	text, err := v.virsh(ctx, "dumpxml", "--inactive", "--security-info")
	if err != nil {
		return err
	}
	file := filepath.Join(v.lab.dir, "vm-"+v.Name+".redefine.xml")
	if err := os.WriteFile(file, []byte(edit(text)), 0o600); err != nil {
		return err
	}
	defer os.Remove(file)
	_, err = v.lab.Virsh(ctx, "define", file)
	return err
}

// AttachDisk plugs a disk in, for as long as the VM is defined.
func (v *VM) AttachDisk(ctx context.Context, d VMDisk) error {
	if d.Format == "" {
		d.Format = strings.TrimPrefix(filepath.Ext(d.Path), ".")
	}
	args := []string{d.Path, d.Target, "--targetbus", "virtio", "--driver", "qemu", "--subdriver", d.Format, "--config"}
	if state, err := v.State(ctx); err != nil {
		return err
	} else if state != "shut off" {
		args = append(args, "--live")
	}
	if d.Serial != "" {
		args = append(args, "--serial", d.Serial)
	}
	_, err := v.virsh(ctx, "attach-disk", args...)
	return err
}

// DetachDisk unplugs a disk for good.
func (v *VM) DetachDisk(ctx context.Context, target string) error {
	_, err := v.virsh(ctx, "detach-disk", target, "--persistent")
	return err
}

// QEMUPid is the process id of the running VM.
func (v *VM) QEMUPid() (int, error) {
	text, err := os.ReadFile(filepath.Join(v.lab.dir, "run/qemu", v.Name+".pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// Kill kills QEMU, as the host's lack of memory would, and waits until libvirt
// has noticed.
func (v *VM) Kill(ctx context.Context) error {
	pid, err := v.QEMUPid()
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill QEMU of %s: %w", v.Name, err)
	}
	return v.waitState(ctx, "shut off")
}

// serialFile has to be where QEMU may write: libvirt hands over files, not
// directories.
func (v *VM) serialFile() string { return v.lab.Path("vm-" + v.Name + ".serial.log") }

// SerialLog is all that the guest has printed on its serial port, over all its
// boots. A VM that was restored from the definition of another goes on writing
// into that one's file.
func (v *VM) SerialLog() string {
	text, _ := os.ReadFile(v.serialFile())
	return strings.ReplaceAll(string(text), "\r", "")
}

// WaitSerial waits until the serial log, from byte from on, has the text.
func (v *VM) WaitSerial(ctx context.Context, from int, text string) error {
	for {
		log := v.SerialLog()
		if len(log) >= from && strings.Contains(log[from:], text) {
			return nil
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return fmt.Errorf("%s does not say %q, but: %s: %w", v.Name, text, log[min(from, len(log)):], err)
		}
	}
}

// Agent sends one command of the guest agent and returns its answer's
// "return".
func (v *VM) Agent(ctx context.Context, command string, arguments any) (json.RawMessage, error) {
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, arguments})
	if err != nil {
		return nil, err
	}
	out, err := v.virsh(ctx, "qemu-agent-command", "--timeout", "20", string(request))
	if err != nil {
		return nil, err
	}
	var answer struct{ Return json.RawMessage }
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, fmt.Errorf("the agent's answer to %s: %w", command, err)
	}
	return answer.Return, nil
}

// WaitAgent waits until the guest agent answers.
func (v *VM) WaitAgent(ctx context.Context) error {
	for {
		_, err := v.Agent(ctx, "guest-ping", nil)
		if err == nil {
			return nil
		}
		if sleepErr := sleep(ctx, 100*time.Millisecond); sleepErr != nil {
			return fmt.Errorf("the agent of %s does not answer: %w; its serial port: %s", v.Name, err, v.SerialLog())
		}
	}
}

// AgentExec runs a program in the guest and returns what it printed. The error
// has its complaints if it ends with another code than 0.
func (v *VM) AgentExec(ctx context.Context, args ...string) (string, error) {
	started, err := v.Agent(ctx, "guest-exec", map[string]any{"path": args[0], "arg": args[1:], "capture-output": true})
	if err != nil {
		return "", err
	}
	var process struct{ PID int }
	if err := json.Unmarshal(started, &process); err != nil {
		return "", err
	}
	for {
		answer, err := v.Agent(ctx, "guest-exec-status", map[string]any{"pid": process.PID})
		if err != nil {
			return "", err
		}
		var status struct {
			Exited   bool
			Exitcode int
			OutData  string `json:"out-data"`
			ErrData  string `json:"err-data"`
		}
		if err := json.Unmarshal(answer, &status); err != nil {
			return "", err
		}
		if status.Exited {
			out, _ := base64.StdEncoding.DecodeString(status.OutData)
			complaints, _ := base64.StdEncoding.DecodeString(status.ErrData)
			if status.Exitcode != 0 {
				return string(out), fmt.Errorf("%s in the guest ended with code %d: %s%s", args[0], status.Exitcode, out, complaints)
			}
			return string(out), nil
		}
		if err := sleep(ctx, 30*time.Millisecond); err != nil {
			return "", err
		}
	}
}

// Shell runs a script with the guest's busybox.
func (v *VM) Shell(ctx context.Context, script string) (string, error) {
	return v.AgentExec(ctx, "/bin/sh", "-ec", script)
}

// Verify is what the guest found on its disk when it last booted:
// "WORKLOAD VERIFY OK app-consistent records 312".
func (v *VM) Verify(ctx context.Context) (string, error) {
	out, err := v.AgentExec(ctx, "/bin/cat", "/run/verify.txt")
	return strings.TrimSpace(out), err
}

// Freeze and Thaw do what a backup does, by hand. Frozen asks the agent.
func (v *VM) Freeze(ctx context.Context) error { _, err := v.virsh(ctx, "domfsfreeze"); return err }
func (v *VM) Thaw(ctx context.Context) error   { _, err := v.virsh(ctx, "domfsthaw"); return err }

func (v *VM) Frozen(ctx context.Context) (bool, error) {
	answer, err := v.Agent(ctx, "guest-fsfreeze-status", nil)
	return string(answer) == `"frozen"`, err
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
