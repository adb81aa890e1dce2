package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/hypervisor/hyperv"
	"github.com/backstay/backstay/internal/hypervisor/hyperv/recording"
)

func (a *app) hypervCmd() *cobra.Command {
	return noun("hyperv", "record what a Hyper-V host answers, for its simulator and tests", a.hypervRecordCmd())
}

func (a *app) hypervRecordCmd() *cobra.Command {
	o := driverOptions{host: hostCredentials()}
	var r record
	cmd := &cobra.Command{
		Use:   "record --out FILE HOST[/NAME]",
		Short: "record a host's answers, without what tells whose it is",
		Long: `Ask a Hyper-V host what a backup asks before it changes anything, and write its
answers to a file that you may send to the project: tests then ask the same of
it. With NAME, that VM is looked at closely. Nothing on the host is changed.

With --cycle it also does what a backup does to the VM NAME, without reading
its disks: a checkpoint (a guest with Windows is told, as by a backup of kind
COPY), which becomes a reference point; a second checkpoint, which is destroyed;
and then the reference point is destroyed, too.

With --restore it also does what a restore does, and the VM NAME stays as it is:
it makes a VM by a description, with an empty disk that it swaps for another, and
one of a copy of the definition of the VM NAME, with an empty disk for each of
its own. Both are called backstay-recorder-…, are connected to no network and
never started, and lie in folders of their own; all of it is taken away again,
also if you break it off. What exactly, it says before it makes anything, and
then asks; without a terminal it needs --yes. What a recording that was killed
left goes with the next one, or with the next backup or restore of that host.

Of a cluster, name a node, or the cluster: the node that has the VM is asked, too.

Names of hosts, domains, users, VMs, files and switches, GUIDs, addresses,
serial numbers, notes and every other text become pseudonyms; numbers, times,
and words that each host says stay. Passwords are never in it. The file is text:
look through it before you send it.`,
		Example: `  backstay hyperv record --out hv01.jsonl hyperv://backup@hv01
  backstay hyperv record --out hv01.jsonl hyperv://backup@hv01/test-vm --cycle
  backstay hyperv record --out hv01.jsonl hyperv://backup@hv01/test-vm --cycle --restore`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := parseSource(args[0])
			switch {
			case err != nil:
				return err
			case s.kind() != "hyperv":
				return usage("%q is no Hyper-V host: want hyperv://USER@HOST or hyperv://USER@HOST/NAME", args[0])
			case r.out == "":
				return usage("--out FILE is needed: where the recording goes")
			case r.cycle && s.vm == "":
				return usage("--cycle needs a VM: want hyperv://USER@HOST/NAME")
			case r.restore && s.vm == "":
				return usage("--restore needs a VM: want hyperv://USER@HOST/NAME")
			case r.yes && !r.restore:
				return usage("--yes agrees to what --restore makes")
			}
			return a.recordHyperV(cmd.Context(), s, o, r)
		},
	}
	cmd.Flags().StringVar(&r.out, "out", "", "file to write; one that exists is never overwritten")
	cmd.Flags().BoolVar(&r.cycle, "cycle", false, "also make and take away checkpoints of the VM, as a backup does")
	cmd.Flags().BoolVar(&r.restore, "restore", false, "also make and take away VMs of its own, as a restore does")
	cmd.Flags().BoolVar(&r.yes, "yes", false, "with --restore: agree to what it makes, without being asked")
	addHostFlags(cmd.Flags(), &o.host)
	return cmd
}

// A record is what is to be recorded.
type record struct {
	out                 string
	cycle, restore, yes bool
}

// errNotAgreed says that the host's owner did not agree to what is made there.
var errNotAgreed = errors.New("nobody agreed to what a restore makes on the host, and it was not made")

func (a *app) recordHyperV(ctx context.Context, s source, o driverOptions, what record) (err error) {
	out := what.out
	// First of all, so that nothing is asked in vain.
	f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return withHint(err, "it is not overwritten; name another file with --out")
	}
	if err != nil {
		return err
	}
	done := false
	defer func() {
		f.Close()
		if !done {
			os.Remove(out)
		}
	}()
	if what.cycle {
		a.say("on the host: two checkpoints of %s and a reference point are made and taken away again; its guest is asked to hold still as for a backup", s.vm)
	}
	r := &recording.Recorder{}
	o.hyperv.Record = r.Record
	d, err := a.openHyperV(ctx, s, o)
	if err != nil {
		return err
	}
	defer d.Close()
	step := func(name string) {
		r.Step(name)
		a.log().Debug("record", "step", name)
	}
	version, err := d.Survey(ctx, s.vm, step)
	absent := errors.Is(err, fault.ErrNotFound) && s.vm != "" // what is not found later on is another thing
	if err == nil && what.cycle {
		err = d.Rehearse(ctx, s.vm, step)
	}
	var made hyperv.RestoreRehearsal
	if err == nil && what.restore {
		made, err = d.RehearseRestore(ctx, s.vm, func(p hyperv.RestorePlan) error { return a.agree(ctx, p, what.yes) }, step)
		for _, text := range made.Said {
			a.say("%s", text)
		}
	}
	if errors.As(err, new(*hyperv.LeftError)) {
		err = withHint(err, "what it does not say stays is taken away by the next recording, backup or restore of that host")
	}
	failed := err
	switch {
	case errors.Is(failed, errNotAgreed):
		return failed
	case absent:
		return withHint(failed, `run "backstay vm list %s" to see which VMs it has`, s.host)
	case failed != nil && (ctx.Err() != nil || !r.Answered()):
		return failed
	}
	c, err := r.Recording(recording.About{VM: s.vm, OS: version, Nodes: d.Nodes(), Folder: made.Folder, By: "backstay " + Version}, time.Now())
	if err != nil {
		return errors.Join(failed, err)
	}
	// A host that we do not understand is the one whose answers are wanted most.
	c.Failed = failed != nil
	if err := errors.Join(c.Write(f), f.Sync(), f.Close()); err != nil {
		return errors.Join(failed, fmt.Errorf("%s: %w", out, err))
	}
	done = true
	if failed != nil {
		a.say("it ended early; what the host answered until then is in %s, and may show why", out)
	}
	return errors.Join(failed, a.printRecording(out, c))
}

// agree says what will be made on a host, and asks whether it may be.
func (a *app) agree(ctx context.Context, p hyperv.RestorePlan, yes bool) error {
	say := a.say
	if !yes { // nobody agrees to what he has not read
		say = func(format string, args ...any) { fmt.Fprintf(a.stderr, format+"\n", args...) }
	}
	say("on the host %s: these are made, and taken away again; %s is not changed, and nothing is started or connected to a network", p.Host, p.VM)
	say("  VM %s, by a description, with an empty disk of %s that is swapped for another", p.Defined, sizeText(p.DiskBytes))
	if p.Imported != "" {
		disks := fmt.Sprintf("%d empty disks", p.Disks)
		if p.Disks == 1 {
			disks = "1 empty disk"
		}
		say("  VM %s, imported of a copy of the definition of %s, with %s of %s", p.Imported, p.VM, disks, sizeText(p.DiskBytes))
	} else {
		say("  no VM is imported: %v", p.NoImport)
	}
	say("  for each a folder of its own, in the first of these that is there: %s", strings.Join(p.Folders, ", "))
	if yes {
		return nil
	}
	if a.stdin == nil || !term.IsTerminal(int(a.stdin.Fd())) {
		return coded{exitRefused, "say --yes if that may be made and taken away, or run it in a terminal", errNotAgreed}
	}
	fmt.Fprint(a.stderr, `If it may, type "yes": `)
	answer := make(chan string, 1)
	go func() { // a read of a terminal is not broken off
		line, _ := bufio.NewReader(a.stdin).ReadString('\n')
		answer <- strings.TrimSpace(line)
	}()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case text := <-answer:
		if text != "yes" {
			return coded{code: exitRefused, err: errNotAgreed}
		}
		return nil
	}
}

func (a *app) printRecording(file string, c *recording.Recording) error {
	if a.json {
		return a.printJSON(struct {
			File string `json:"file"`
			recording.Header
			Exchanges int            `json:"exchanges"`
			Replaced  map[string]int `json:"replaced"`
			Stayed    []string       `json:"stayed"`
		}{file, c.Header, len(c.Exchanges), c.Replaced, c.Stayed})
	}
	fmt.Fprintf(a.stdout, "%s: %d requests with their answers (%s), of %s", file, len(c.Exchanges), strings.Join(c.Method, ", "), c.Date)
	if c.OS != "" {
		fmt.Fprintf(a.stdout, ", Windows %s", c.OS)
	}
	fmt.Fprintln(a.stdout)
	if c.LeftOut > 0 {
		fmt.Fprintf(a.stdout, "  left out, because they are no envelopes that could be judged: %d\n", c.LeftOut)
	}
	if c.Unanswered > 0 {
		fmt.Fprintf(a.stdout, "  without an answer: %d\n", c.Unanswered)
	}
	for _, kind := range recording.Kinds() {
		if n := c.Replaced[kind]; n > 0 {
			fmt.Fprintf(a.stdout, "  %s replaced: %d\n", kind, n)
		}
	}
	fmt.Fprintf(a.stdout, "  what stayed beside numbers, times and the names of classes and properties:\n    %s\n", strings.Join(c.Stayed, " "))
	a.say("look through %s before you send it: it is text, a line for each request", file)
	return nil
}
