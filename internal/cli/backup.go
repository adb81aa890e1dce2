package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/backup"
	"github.com/backstay/backstay/internal/hypervisor"
	"github.com/backstay/backstay/internal/hypervisor/hyperv"
	"github.com/backstay/backstay/internal/hypervisor/kvm"
	"github.com/backstay/backstay/internal/image"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

type backupOptions struct {
	vm          string
	consistency string
	format      string
	level       string
	overlays    string
	exclude     []string
	freezeLimit time.Duration
	maxDelta    sizeFlag
	parallel    int
	audit       float64
	parents     imageInput // as --parents says; nothing else of it
	scratchDir  string
	freezeHook  bool
	savedState  bool
	truncate    bool
	mergeWait   time.Duration
	host        credentials
}

func (a *app) backupCmd() *cobra.Command {
	o := backupOptions{host: hostCredentials()}
	cmd := &cobra.Command{
		Use:   "backup SOURCE…",
		Short: "back up VMs and disk images",
		Long: `Back up VMs and disk images. A SOURCE is kvm:///system/NAME,
hyperv://USER@HOST/NAME, or an image file of any format. With --vm all image files are disks of that VM; without it each is
a VM of its own, called by its file name.

A first backup reads everything. Later ones read what changed block tracking
names, and of the rest a random sample, to catch a tracker that lies. Where
nothing tracks, everything is read and compared by hash, and only what is new
is stored: of a chunk that changed a little, the 4 KiB blocks that did, unless
--overlays is off. Whatever was read, every restore point is whole.

A guest is frozen for a moment through its agent, if it has one:
  require-application  writers of the guest's applications ran, or it fails
  prefer-application   the best that can be had, with a warning where it is less
  filesystem           the file systems were frozen, or it fails
  crash                no freeze: as after a power cut

Hyper-V hosts need no program of ours: WinRM takes the checkpoint, and the disks
are read over SMB, by C$ and its like, which only administrators may use, or by
the shares that the source names. After ? a source may say
  fingerprint=sha256:HEX   the host's certificate, where no authority vouches for it
  ca=FILE                  the authority to believe
  auth=basic               instead of NTLM
  smb=HOST:PORT            where the files are reached, if not at HOST
  share=C:\FOLDER=SHARE    what is below FOLDER is in the share SHARE
With --truncate-logs the applications in a Windows guest (SQL Server, Exchange)
truncate their logs as after a backup of their own, when the checkpoint is made:
before the restore point is there. Without it, their logs stay as they are; so
they do where a disk of the VM is left out (--exclude-disk, passed through,
shared), with a warning. Disks that the guest reaches by itself, as by iSCSI,
are not seen: do not ask for it where applications keep data on those.
hyperv+http:// is WinRM over HTTP, with every message sealed. DOMAIN\USER is
written DOMAIN%5CUSER; a name that two VMs have gives way to their GUIDs.`,
		Example: `  backstay backup kvm:///system/web01 --repo /srv/backup
  backstay backup kvm:///system/web01 kvm:///system/db01 --consistency filesystem
  backstay backup disk.vhdx other.vmdk --vm old-server --repo /srv/backup
  backstay backup 'hyperv://backup@hv01/web01?fingerprint=sha256:5F…' --host-password-file hv01.password`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.backup(cmd.Context(), o, args) },
	}
	f := cmd.Flags()
	f.StringVar(&o.vm, "vm", "", "what to call the VM in the repository; image files become its disks")
	f.StringVar(&o.consistency, "consistency", string(vm.PreferApplication), "require-application, prefer-application, filesystem or crash")
	f.StringVar(&o.format, "format", "", "what the image files are: "+formatHelp)
	f.StringVar(&o.level, "compression", "fast", "none, fast, default or high")
	f.StringVar(&o.overlays, "overlays", "on", "store a changed chunk as what changed in it: on or off")
	f.StringArrayVar(&o.exclude, "exclude-disk", nil, "leave out this disk of a VM (vdb); may be repeated")
	f.DurationVar(&o.freezeLimit, "freeze-limit", 2*time.Second, "thaw the guest after this, whatever happens")
	f.Var(&o.maxDelta, "max-delta", "stop if the guest overwrites more than this while it is backed up; 0 for no bound")
	f.IntVar(&o.parallel, "parallel", backup.DefaultVMs, "VMs backed up at once")
	f.Var((*parentsFlag)(&o.parents), "parents", "open parents and data files of image files that lie in or beneath the image's directory, or beneath DIR")
	f.Lookup("parents").NoOptDefVal = "true"
	f.StringVar(&o.scratchDir, "scratch-dir", "", "directory on the host for what guests overwrite meanwhile (default /var/lib/libvirt/backstay)")
	f.BoolVar(&o.freezeHook, "freeze-hook-configured", false, "the guests' agents run a freeze hook, also where the agent does not let that be seen")
	f.BoolVar(&o.savedState, "allow-saved-state", false, "where a Hyper-V host can make no other checkpoint, one that saves the guest's memory will do")
	f.BoolVar(&o.truncate, "truncate-logs", false, "have applications in a Windows guest of Hyper-V truncate their logs; only with an application-consistent restore point")
	f.DurationVar(&o.mergeWait, "merge-wait", time.Hour, "watch a Hyper-V host merge what the guest wrote meanwhile for this long")
	addHostFlags(f, &o.host)
	f.Float64Var(&o.audit, "audit", backup.DefaultAudit*100, "percent of the chunks called unchanged that are re-read and compared; 0 for none")
	completeWords(cmd, "consistency", []string{string(vm.RequireApplication), string(vm.PreferApplication), string(vm.Filesystem), string(vm.Crash)})
	completeWords(cmd, "format", readableWords())
	completeWords(cmd, "compression", []string{string(repo.LevelNone), string(repo.LevelFast), string(repo.LevelDefault), string(repo.LevelHigh)})
	completeWords(cmd, "overlays", []string{"on", "off"})
	return cmd
}

func (a *app) backup(ctx context.Context, o backupOptions, args []string) error {
	c, err := vm.ParseConsistency(o.consistency)
	if err != nil {
		return usageError{err}
	}
	switch {
	case o.audit < 0 || o.audit > 100:
		return usage("--audit %g: want a percentage", o.audit)
	case o.parallel < 1:
		return usage("--parallel %d: want at least 1", o.parallel)
	case o.mergeWait <= 0:
		return usage("--merge-wait %s: want a time, for example 1h", o.mergeWait)
	case o.freezeLimit <= 0:
		return usage("--freeze-limit %s: want a time, for example 2s", o.freezeLimit)
	}
	switch repo.Level(o.level) {
	case repo.LevelNone, repo.LevelFast, repo.LevelDefault, repo.LevelHigh:
	default:
		return usage("--compression %q: want none, fast, default or high", o.level)
	}
	if o.overlays != "on" && o.overlays != "off" {
		return usage("--overlays %q: want on or off", o.overlays)
	}
	var format image.Format
	if o.format != "" {
		if format, err = parseFormat(o.format); err != nil {
			return err
		}
	}
	var files, vms []source
	for _, arg := range args {
		s, err := parseSource(arg)
		if err != nil {
			return err
		}
		switch {
		case s.scheme == "":
			files = append(files, s)
		case s.vm == "":
			return usage(`%q names a host and no VM; "backstay vm list %s" shows which it has`, arg, arg)
		default:
			vms = append(vms, s)
		}
	}
	if len(files) == 0 && (o.format != "" || o.parents.parents) {
		return usage("--format and --parents are of image files, and none is named")
	}
	if o.truncate {
		if c != vm.RequireApplication && c != vm.PreferApplication {
			return usage("--truncate-logs needs --consistency require-application or prefer-application")
		}
		for _, s := range append(slices.Clone(files), vms...) {
			if s.kind() != "hyperv" {
				return usage("--truncate-logs: %s is no VM of a Hyper-V host", s.text)
			}
		}
	}
	if o.vm != "" && (len(vms) > 1 || len(vms) == 1 && len(files) > 0) {
		return usage("--vm names one VM, and the sources are several")
	}
	template := backup.Job{VM: o.vm, Consistency: c, FreezeLimit: o.freezeLimit, ScratchLimit: int64(o.maxDelta)}
	for _, d := range o.exclude {
		template.Exclude = append(template.Exclude, vm.DiskID(d))
	}
	in := o.parents
	in.format = string(format)
	jobs, err := a.imageJobs(template, files, in)
	if err != nil {
		return err
	}

	r, err := a.openRepo(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	drivers := map[string]hypervisor.Driver{}
	defer func() {
		for _, d := range drivers {
			d.Close()
		}
		for _, j := range jobs {
			j.Driver.Close()
		}
	}()
	var failed []backup.Result
	for _, s := range vms {
		d := drivers[s.host.String()]
		if d == nil {
			d, err = a.openDriver(ctx, s, driverOptions{host: o.host,
				kvm:    kvm.Options{ScratchDir: o.scratchDir, FreezeHook: o.freezeHook},
				hyperv: hyperv.Options{AllowSavedState: o.savedState, TruncateLogs: o.truncate, MergeWait: o.mergeWait}})
			if err != nil {
				// The other VMs may live on other hosts.
				failed = append(failed, backup.Result{VM: s.vm, Job: backup.Job{Name: s.vm, Source: s.text}, Err: fmt.Errorf("back up %s: %w", s.vm, err)})
				continue
			}
			drivers[s.host.String()] = d
		}
		j := template
		j.Driver, j.Name, j.Source = d, s.vm, s.text
		jobs = append(jobs, j)
	}
	bar := a.newBar("backing up")
	if o.audit == 0 {
		o.audit = -1
	}
	results := append(failed, backup.Run(ctx, backup.Options{
		Repo: r, Level: repo.Level(o.level), NoOverlays: o.overlays == "off", VMs: o.parallel, Audit: o.audit / 100, Log: a.log(), Progress: barProgress{bar},
	}, jobs)...)
	bar.end()
	a.joinIndex(ctx, r)
	for i := range results {
		noteUnknownExcludes(&results[i], o.exclude)
	}
	return a.reportBackups(results)
}

// joinIndex is the last thing that a command does which stored much.
func (a *app) joinIndex(ctx context.Context, r *repo.Repository) {
	if _, err := r.JoinIndex(ctx); err != nil && ctx.Err() == nil {
		a.say("the index was not joined, which takes memory until \"backstay repo vacuum\" does it: %v", err)
	}
}

// noteUnknownExcludes warns of a disk to be left out that the VM does not
// have: a slip of the pen backs up what was meant to be left out.
func noteUnknownExcludes(r *backup.Result, exclude []string) {
	if r.Point == nil {
		return
	}
	for _, id := range exclude {
		found := false
		for _, d := range r.Point.Unprotected {
			found = found || string(d.ID) == id
		}
		if !found {
			r.Warnings = append(r.Warnings, fmt.Sprintf("--exclude-disk %s: this VM has no such disk", id))
		}
	}
}

type barProgress struct{ *bar }

func (p barProgress) Total(n int64) { p.addTotal(n) }
func (p barProgress) Add(n int64)   { p.add(n) }

// reportBackups prints every VM's summary and makes one exit code of them.
func (a *app) reportBackups(results []backup.Result) error {
	code := exitDone
	var first error
	for _, r := range results {
		if a.json {
			if err := a.printJSON(resultJSON(r)); err != nil {
				return err
			}
		}
		if len(r.Lied) > 0 || r.Damage != nil {
			code = worse(code, exitCorrupt)
		}
		if r.Err != nil {
			code = worse(code, exitCode(r.Err))
			if first == nil {
				first = r.Err
			}
			if !a.json {
				a.printAlarms(r)
			}
			if len(results) > 1 {
				fmt.Fprintf(a.stderr, "backstay: %v\n", r.Err)
			}
			continue
		}
		if !a.json {
			a.printResult(r)
		}
		if len(r.Warnings) > 0 || len(r.Point.Unprotected) > 0 {
			code = worse(code, exitWarnings)
		}
	}
	if first == nil {
		a.code = code
		return nil
	}
	if len(results) == 1 {
		if code == exitCode(first) {
			return first
		}
		return coded{code: code, err: first}
	}
	good := 0
	for _, r := range results {
		if r.Err == nil {
			good++
		}
	}
	a.say("%d of %d backed up", good, len(results))
	return coded{code: code, err: errors.Join(errPartial, first)}
}

// printResult is the summary of one VM, for people.
func (a *app) printResult(r backup.Result) {
	p := r.Point
	fmt.Fprintf(a.stdout, "%s  %s", p.Ref(), p.Grade)
	if p.FrozenFor > 0 {
		fmt.Fprintf(a.stdout, ", guest frozen for %s", timeText(p.FrozenFor))
	}
	fmt.Fprintf(a.stdout, ", %s\n", timeText(r.Duration))
	for _, d := range p.Disks {
		fmt.Fprintf(a.stdout, "  %s: %s", d.ID, diskText(d))
		if a.verbose {
			fmt.Fprintf(a.stdout, ", in %s%s", timeText(d.Stats.Duration), rateText(d.Stats.ReadBytes, d.Stats.Duration))
		}
		fmt.Fprintln(a.stdout)
	}
	for _, d := range p.Unprotected {
		fmt.Fprintf(a.stdout, "  %s: NOT PROTECTED: %s\n", d.ID, d.Excluded)
	}
	a.printAlarms(r)
	for _, w := range r.Warnings {
		fmt.Fprintf(a.stdout, "  warning: %s\n", w)
	}
}

// printAlarms tells what nobody may overlook, also of a run that failed.
func (a *app) printAlarms(r backup.Result) {
	good := ""
	if r.Err == nil {
		good = "; this point was read whole and is good"
	}
	for _, id := range r.Lied {
		fmt.Fprintf(a.stdout, "  ALARM: change tracking of disk %s lied%s\n", id, good)
	}
	for _, id := range r.Suspect {
		fmt.Fprintf(a.stdout, "  SUSPECT: %s/%s rests on that tracking\n", vm.EscapeName(r.VM), id)
	}
	if r.Damage != nil {
		fmt.Fprintf(a.stdout, "  DAMAGE found in the repository, and read around: %v\n", r.Damage)
	}
}

// A backupJSON is one VM of backup --json.
type backupJSON struct {
	*point.RestorePoint
	VM          string      `json:"vm"` // also of a VM that failed
	SizeBytes   int64       `json:"size_bytes"`
	Error       string      `json:"error,omitempty"`
	Damage      string      `json:"damage,omitempty"` // of the repository, found on the way
	Lied        []vm.DiskID `json:"tracking_lied,omitempty"`
	NewSuspects []point.ID  `json:"new_suspects,omitempty"`
	AllWarnings []string    `json:"warnings,omitempty"`
	DurationNS  int64       `json:"duration_ns"`
	HostNS      int64       `json:"host_ns"`
}

func resultJSON(r backup.Result) backupJSON {
	out := backupJSON{RestorePoint: r.Point, VM: r.VM, Lied: r.Lied, NewSuspects: r.Suspect, AllWarnings: r.Warnings,
		DurationNS: int64(r.Duration), HostNS: int64(r.HostTime)}
	if out.VM == "" {
		out.VM = r.Job.Name
	}
	if r.Point != nil {
		out.SizeBytes = r.Point.SizeBytes()
	}
	if r.Damage != nil {
		out.Damage = r.Damage.Error()
	}
	if r.Err != nil {
		out.Error = r.Err.Error()
	}
	return out
}

// parseFormat knows the formats that can be read; which can be written, too,
// is for open.CheckCreate to say.
func parseFormat(s string) (image.Format, error) {
	if !slices.Contains(readableWords(), s) {
		return "", usage("unknown format %q: want %s", s, oneOf(readableWords()))
	}
	return image.Format(s), nil
}
