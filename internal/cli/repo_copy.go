package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/point"
	"github.com/backstay/backstay/internal/repo"
	"github.com/backstay/backstay/internal/vm"
)

type copyOptions struct {
	to      string
	cred    credentials
	replica bool
	vms     []string
	newest  int
	level   string
}

func (a *app) repoCopyCmd() *cobra.Command {
	o := copyOptions{cred: credentials{to: "to-"}}
	cmd := &cobra.Command{
		Use:   "copy --to URL [POINT…]",
		Short: "copy restore points into another repository",
		Long: `Copy restore points into another repository: all of them, those that are named,
or with --vm and --newest some. They keep their names, times and grades, so the
same command again copies only what is new, and goes on where an interrupted one
stopped. Nothing is ever deleted on the other side: points that were deleted here
stay there.

Only chunks that the other side lacks are sent, and each is decrypted and
verified on the way. Any two repositories will do, on any stores, with different
keys and chunk sizes: make the other one with "backstay repo init". With
--replica it is made here, with the id and the keys of this one; then chunks go
over as they are encrypted, and every key opens both. After a master key leaked
that is the wrong thing: make a new repository and copy into that.

A point whose data are damaged here is named and left out, the others are
copied, and the exit code is 3.`,
		Example: `  backstay repo copy --to s3://s3.example.com/backups/site-a --replica --repo /srv/backup
  backstay repo copy --to sftp://backup@nas.example.com/srv/second --to-password-file /root/second.pass --repo /srv/backup
  backstay repo copy --to /mnt/usb/backup --vm web01 --newest 3 --repo /srv/backup`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.repoCopy(cmd.Context(), o, args) },
	}
	f := cmd.Flags()
	f.StringVar(&o.to, "to", "", "the other repository, as --repo names one")
	o.cred.addFlags(f, "other repository's ")
	o.cred.addIdentityFlag(f, "other ")
	f.BoolVar(&o.replica, "replica", false, "make the other repository where there is none, with this one's id and keys")
	f.StringArrayVar(&o.vms, "vm", nil, "only points of this VM; may be repeated")
	f.IntVar(&o.newest, "newest", 0, "only this many of the newest points of each VM")
	f.StringVar(&o.level, "compression", string(repo.LevelFast), "of what has to be encrypted again: none, fast, default or high")
	return cmd
}

func (a *app) repoCopy(ctx context.Context, o copyOptions, refs []string) error {
	switch {
	case o.to == "":
		return usage("say where to with --to URL")
	case len(refs) > 0 && (len(o.vms) > 0 || o.newest > 0):
		return usage("name points, or choose them with --vm and --newest")
	case o.newest < 0:
		return usage("--newest %d: want a number of points", o.newest)
	case !slices.Contains([]repo.Level{repo.LevelNone, repo.LevelFast, repo.LevelDefault, repo.LevelHigh}, repo.Level(o.level)):
		return usage("--compression %q: want none, fast, default or high", o.level)
	}
	from, err := a.openRepo(ctx)
	if err != nil {
		return err
	}
	defer from.Close()
	points, unread := from.Points(ctx)
	if unread != nil && len(repo.UnreadRecords(unread)) == 0 {
		return unread
	}
	if points, err = choosePoints(points, o, refs); err != nil {
		return err
	}
	to, err := a.openOther(ctx, from, o)
	if err != nil {
		return err
	}
	defer to.Close()
	sum := copySummary{From: from.ID(), To: to.ID(), Same: from.Same(to), Points: []copyLine{}}
	bar := a.newBar("copying")
	err = from.CopyPoints(ctx, to, repo.CopyOptions{Points: points, Level: repo.Level(o.level), Progress: bar.set, Told: sum.add})
	bar.end()
	a.joinIndex(ctx, to)
	if perr := a.printCopy(sum, err == nil); perr != nil {
		return perr
	}
	if err != nil {
		if errors.Is(err, context.Canceled) {
			err = withHint(err, "run the same command again: it goes on where it was, and sends nothing twice")
		}
		return err
	}
	if sum.Damaged > 0 {
		return coded{code: exitCorrupt, err: fmt.Errorf("%s damaged here and not copied", plural(int64(sum.Damaged), "restore point")),
			hint: `run "backstay repo check --read-data"; a copy of an earlier date may have what is lost`}
	}
	return unread
}

// choosePoints are those that the flags or refs name.
func choosePoints(points []*point.RestorePoint, o copyOptions, refs []string) (out []*point.RestorePoint, err error) {
	if len(refs) > 0 {
		for _, ref := range refs {
			name, id, err := point.ParseRef(ref)
			if err != nil {
				return nil, usageError{err}
			}
			p := pick(points, name, id)
			if p == nil {
				return nil, withHint(fmt.Errorf("restore point %s: %w", ref, fault.ErrNotFound), `run "backstay point list" to see which restore points there are`)
			}
			if !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
		return out, nil
	}
	for i, name := range o.vms {
		o.vms[i] = vm.UnescapeName(name)
		if pick(points, o.vms[i], "") == nil {
			return nil, withHint(fmt.Errorf("VM %s: no restore point: %w", name, fault.ErrNotFound), `run "backstay point list" to see which VMs there are`)
		}
	}
	// Points come by VM and then by time.
	left := map[string]int{}
	for _, p := range slices.Backward(points) {
		if len(o.vms) > 0 && !slices.Contains(o.vms, p.VM) {
			continue
		}
		if left[p.VM]++; o.newest > 0 && left[p.VM] > o.newest {
			continue
		}
		out = append(out, p)
	}
	return out, nil
}

// pick is the point of that name, or the VM's newest where id is empty.
func pick(points []*point.RestorePoint, name string, id point.ID) *point.RestorePoint {
	for _, p := range slices.Backward(points) {
		if p.VM == name && (id == "" || p.ID == id) {
			return p
		}
	}
	return nil
}

// openOther opens the repository that --to names. One with the id of from has
// its keys as well, unless others are named.
func (a *app) openOther(ctx context.Context, from *repo.Repository, o copyOptions) (*repo.Repository, error) {
	b := *a
	b.repoURL, b.cred = o.to, o.cred
	st, err := b.openStore(ctx)
	if err == nil {
		_, err = st.Size(ctx, "repo.json")
		st.Close()
	}
	switch {
	case errors.Is(err, fault.ErrNotFound) && o.replica:
		if err := b.makeReplica(ctx, from); err != nil {
			return nil, err
		}
	case errors.Is(err, fault.ErrNotFound):
		return nil, withHint(fmt.Errorf("destination %s: %w", o.to, fault.ErrNotFound), `make one with "backstay repo init --repo %s", or say --replica`, o.to)
	case err != nil:
		return nil, fmt.Errorf("destination: %w", err)
	}
	k, err := b.openKeyless(ctx)
	if err != nil {
		return nil, fmt.Errorf("destination: %w", err)
	}
	same := k.ID() == from.ID()
	k.Close()
	if o.replica && !same {
		return nil, coded{code: exitRefused, err: fmt.Errorf("destination %s is another repository, %s, and no replica of %s", o.to, k.ID()[:8], from.ID()[:8]),
			hint: "leave out --replica to copy into it, or name a new place"}
	}
	if same && !b.atHand(&b.cred) {
		b.cred = a.cred
	}
	to, err := b.openRepo(ctx)
	if err != nil {
		return nil, fmt.Errorf("destination: %w", err)
	}
	return to, nil
}

func (a *app) makeReplica(ctx context.Context, from *repo.Repository) error {
	at, err := a.storeAt()
	if err != nil {
		return err
	}
	st, err := a.createStore(ctx, at)
	if err != nil {
		return err
	}
	defer st.Close()
	if err := from.Replicate(ctx, st); err != nil {
		return fmt.Errorf("destination %s: %w", st, err)
	}
	a.say("made %s, a replica with the same keys", st)
	return nil
}

// A copySummary is the result of a copy as --json prints it.
type copySummary struct {
	From    string     `json:"from"` // ids
	To      string     `json:"to"`
	Same    bool       `json:"same_keys"`
	Copied  int        `json:"copied"`
	There   int        `json:"there"` // before
	Damaged int        `json:"damaged"`
	Read    int64      `json:"read_bytes"`
	Sent    int64      `json:"sent_bytes"`
	Done    bool       `json:"done"`
	Gone    int        `json:"gone"` // deleted here meanwhile
	Points  []copyLine `json:"points"`

	refs []string
}

type copyLine struct {
	VM    string   `json:"vm"`
	ID    point.ID `json:"id"`
	State string   `json:"state"`
	Read  int64    `json:"read_bytes"`
	Sent  int64    `json:"sent_bytes"`
	Error string   `json:"error,omitempty"`
}

func (s *copySummary) add(c repo.PointCopy) {
	l := copyLine{VM: c.Point.VM, ID: c.Point.ID, State: c.State, Read: c.ReadBytes, Sent: c.SentBytes}
	switch c.State {
	case repo.CopyDone:
		s.Copied++
	case repo.CopyThere:
		s.There++
	case repo.CopyGone:
		s.Gone++
	case repo.CopyFailed:
		s.Damaged++
		l.Error = c.Err.Error()
	}
	s.Read += c.ReadBytes
	s.Sent += c.SentBytes
	s.Points = append(s.Points, l)
	s.refs = append(s.refs, c.Point.Ref())
}

func (a *app) printCopy(s copySummary, done bool) error {
	s.Done = done
	if a.json {
		return a.printJSON(s)
	}
	for i, p := range s.Points {
		switch p.State {
		case repo.CopyDone:
			fmt.Fprintf(a.stdout, "copied %s: read %s, sent %s\n", s.refs[i], sizeText(p.Read), sizeText(p.Sent))
		case repo.CopyGone:
			fmt.Fprintf(a.stdout, "%s was deleted meanwhile: not copied\n", s.refs[i])
		case repo.CopyFailed:
			fmt.Fprintf(a.stdout, "DAMAGED %s: not copied: %s\n", s.refs[i], clean(p.Error))
		}
	}
	verb := ""
	if !done {
		verb = "so far "
	}
	fmt.Fprintf(a.stdout, "%s%s copied and verified, %d there before; sent %s\n", verb, plural(int64(s.Copied), "restore point"), s.There, sizeText(s.Sent))
	return nil
}
