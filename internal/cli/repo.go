package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"

	"github.com/backstay/backstay/internal/chunk"
	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/repo"
)

func (a *app) repoCmd() *cobra.Command {
	return noun("repo", "make and care for a repository",
		a.repoInitCmd(), a.repoInfoCmd(), a.repoCheckCmd(), a.repoRepairCmd(), a.repoVacuumCmd(), a.repoKeyCmd(), a.repoCopyCmd(), a.repoServeCmd())
}

func (a *app) repoInitCmd() *cobra.Command {
	o := initOptions{chunkBytes: chunk.DefaultBytes}
	cmd := &cobra.Command{
		Use:   "init",
		Short: "make an empty repository",
		Long: `Make an empty repository in a directory that is empty or does not exist, in a
bucket (s3://endpoint/bucket/prefix; credentials from AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY or ~/.aws/credentials; ?region= where the storage cannot
be asked; s3+http:// without TLS), in a container of Azure Blob Storage
(azblob://account/container/prefix; credentials from AZURE_STORAGE_KEY,
AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_CONNECTION_STRING, or from a file that
one of these names with _FILE behind it), behind SFTP (sftp://user@host/path,
with the ssh program and its configuration), or on a repository server
(backstay://host:port/name, with a token from "backstay repo serve token add").
A mounted share is a directory.

Everything in it is encrypted. Whoever has the passphrase, or an identity for
one of the recipients, can restore; nobody else can, and nothing can be
restored once they are all lost. --recovery-kit writes one more key, with what a
restore needs, to print and lock away. More keys can be added and removed at any
time with "backstay repo key".

With parity (3.3 % more space) what goes bad on the disks heals: see "backstay
repo repair". By default it is on in directories and behind SFTP, and off in
object storages, which do the like themselves.`,
		Example: `  backstay repo init --repo /srv/backup --password-file /root/backstay.pass
  backstay repo init --repo /srv/backup --recovery-kit kit.txt
  backstay repo init --repo s3://s3.example.com/backups/site-a
  backstay repo init --repo s3://s3.example.com/locked/site-a --immutable-for 14d
  AZURE_STORAGE_KEY_FILE=/root/azure.key backstay repo init --repo azblob://examplebackups/site-a
  backstay repo init --repo sftp://backup@nas.example.com/srv/backup
  backstay repo init --repo backstay://nas.example.com/web --token-file /root/web.token
  backstay repo init --repo /srv/backup --recipient age1qyqszqgpqyqszqgpqyqszqgpqyqszqgpqyqszqgpqyqszqgpqyqs3290gq`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.repoInit(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.Var(&o.chunkBytes, "chunk-size", "unit of deduplication, 64K to 4M")
	f.StringVar(&o.parity, "parity", "auto", oneOf(parityWords)+": store what heals damage beside each object")
	completeWords(cmd, "parity", parityWords)
	f.StringArrayVar(&o.recipients, "recipient", nil, "age recipient that can open the repository; may be repeated")
	f.StringVar(&o.immutable, "immutable-for", "", "how long each restore point stays whatever anybody asks, such as 14d; in a bucket with Object Lock the storage sees to it")
	f.StringVar(&o.label, "label", "", "whose passphrase it is, for people; encrypted like all else")
	f.StringVar(&o.kit, "recovery-kit", "", "make a recovery key too and write it, with what a restore needs, to this new file (- for stdout)")
	return cmd
}

type initOptions struct {
	chunkBytes sizeFlag
	recipients []string
	parity     string
	label      string
	kit        string
	immutable  string
}

var parityWords = []string{"auto", "on", "off"}

// initKeys are the keys of a new repository but for the recovery kit.
func (a *app) initKeys(o initOptions) (keys []repo.NewKey, err error) {
	ids, err := a.identities(&a.cred)
	if err != nil {
		return nil, err
	}
	for _, r := range o.recipients {
		rec, err := age.ParseX25519Recipient(r)
		if err != nil {
			return nil, usage("--recipient %q: not an age X25519 recipient", r)
		}
		keys = append(keys, repo.NewKey{Recipient: rec, Identities: ids})
	}
	cmd, err := a.keeper(&a.cred)
	if err != nil {
		return nil, err
	}
	if cmd != nil {
		keys = append(keys, repo.NewKey{Keeper: cmd})
	}
	if len(keys) == 0 || a.hasPassphrase(&a.cred) {
		p, err := a.newPassphrase(&a.cred)
		if err != nil {
			return nil, err
		}
		keys = append(keys, repo.NewKey{Passphrase: p})
	}
	for i := range keys {
		keys[i].Label = o.label
	}
	return keys, nil
}

func (a *app) repoInit(ctx context.Context, o initOptions) error {
	chunkBytes := int64(o.chunkBytes)
	if !slices.Contains(parityWords, o.parity) {
		return usage("unknown --parity %q: want %s", o.parity, oneOf(parityWords))
	}
	if err := chunk.CheckBytes(chunkBytes); err != nil {
		return usage("--chunk-size: %w", err)
	}
	var immutable time.Duration
	if o.immutable != "" {
		var err error
		if immutable, err = parsePeriod(o.immutable); err != nil {
			return usage("--immutable-for: %w", err)
		}
	}
	at, err := a.storeAt()
	if err != nil {
		return err
	}
	keys, err := a.initKeys(o)
	if err != nil {
		return err
	}
	k := &kit{app: a, to: o.kit}
	if o.kit != "" {
		nk, err := k.recoveryKey("recovery kit")
		if err != nil {
			return err
		}
		keys = append([]repo.NewKey{nk}, keys...)
	}
	st, err := a.createStore(ctx, at)
	if err != nil {
		return err
	}
	defer st.Close()
	k.repo = st.String()
	parity := o.parity == "on" || o.parity == "auto" && at.ownDisks()
	err = repo.Init(ctx, st, repo.InitOptions{ChunkBytes: chunkBytes, Keys: keys, Parity: parity, ImmutableFor: immutable})
	if o.kit != "" {
		k.end(err)
	}
	if err != nil {
		err = fmt.Errorf("repository %s: %w", st, err)
		if immutable > 0 && errors.Is(err, fault.ErrUnsupported) {
			err = withHint(err, "make a bucket with Object Lock for it; without --immutable-for this one will do")
		}
		return err
	}
	if a.json {
		return a.printJSON(map[string]any{"repository": st.String(), "chunk_bytes": chunkBytes, "parity": parity, "immutable_seconds": int64(immutable / time.Second)})
	}
	with := ""
	if parity {
		with = ", with parity"
	}
	if immutable > 0 {
		with += fmt.Sprintf(", each restore point immutable for %s", o.immutable)
	}
	fmt.Fprintf(a.stdout, "made repository %s, chunks of %s, encrypted%s\n", st, sizeText(chunkBytes), with)
	a.say("keep the passphrase or identity somewhere else too: without it nothing here can be restored")
	return nil
}

func (a *app) repoInfoCmd() *cobra.Command {
	var byVM bool
	cmd := &cobra.Command{
		Use:   "info",
		Short: "show what a repository is and holds",
		Long: `Show what a repository is and holds.

--by-vm shows what each VM and each restore point costs: how much it needs, how
much of that others need too and who, what deleting it would free, and how the
repository grew from point to point. It reads all manifests and no data. Bytes
are what chunks take in packs; a vacuum frees them up to its waste threshold,
with some 50 bytes a chunk more for what packs say about them.`,
		Example: `  backstay repo info --repo /srv/backup
  backstay repo info --by-vm --repo /srv/backup
  backstay repo info --by-vm --json --repo /srv/backup`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if byVM {
				return a.repoUsage(cmd.Context())
			}
			r, err := a.openRepo(cmd.Context())
			if err != nil {
				return err
			}
			defer r.Close()
			info, err := r.Info(cmd.Context())
			if err != nil && len(repo.UnreadRecords(err)) == 0 {
				return err
			}
			if !a.json {
				a.printInfo(info)
			} else if err := a.printJSON(info); err != nil {
				return err
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&byVM, "by-vm", false, "show what each VM and each restore point costs, and what deleting it would free")
	return cmd
}

func (a *app) repoCheckCmd() *cobra.Command {
	var o repo.CheckOptions
	cmd := &cobra.Command{
		Use:   "check",
		Short: "say whether a repository is sound",
		Long: `Say whether a repository is sound.

Without flags it looks whether everything that restore points need is there.
--scrub re-reads every stored byte and compares checksums; it needs no key.
--read-data decrypts, decompresses and re-hashes everything.

--budget and --for let either of them go round in turns, one every night: they read
what was read longest ago. When that was is kept in the repository, and every
check says how much of it was read in the last 30 days.

Damage is listed with the restore points, disks and byte ranges that it hits,
and makes the exit code 3. What --scrub and --read-data find damaged in packs is
noted in the repository: "backstay repo repair" heals what it can, and the next
backup that meets it stores it again, which heals older points too. Packs that
they read get the parity that they lack. Nothing else is changed.`,
		Example: `  backstay repo check --repo /srv/backup
  backstay repo check --scrub --repo /srv/backup
  backstay repo check --scrub --budget 100G --repo /srv/backup
  backstay repo check --read-data --repo /srv/backup`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Scrub = o.Scrub || o.Budget > 0 || o.For > 0
			return a.repoCheck(cmd.Context(), o)
		},
	}
	a.asOfFlag(cmd.Flags())
	cmd.Flags().BoolVar(&o.Scrub, "scrub", false, "re-read every stored byte and compare checksums; needs no key")
	cmd.Flags().BoolVar(&o.ReadData, "read-data", false, "decrypt, decompress and re-hash everything")
	cmd.Flags().Var((*sizeFlag)(&o.Budget), "budget", "read only about so much, what was read longest ago first; implies --scrub")
	cmd.Flags().DurationVar(&o.For, "for", 0, "read only for so long, what was read longest ago first; implies --scrub")
	return cmd
}

// openCareful opens with a key if one is at hand or needed, without one
// otherwise: an operator needs none to scrub and to vacuum.
func (a *app) openCareful(ctx context.Context, needKey bool) (*repo.Repository, error) {
	if needKey || a.atHand(&a.cred) {
		return a.openRepo(ctx)
	}
	return a.openKeyless(ctx)
}

func (a *app) openKeyless(ctx context.Context) (*repo.Repository, error) {
	st, err := a.openStore(ctx)
	if err != nil {
		return nil, err
	}
	r, err := repo.OpenKeyless(ctx, st)
	if err != nil {
		st.Close()
		return nil, fmt.Errorf("repository %s: %w", st, err)
	}
	a.keepIndex(r)
	return r, nil
}

func (a *app) repoCheck(ctx context.Context, o repo.CheckOptions) error {
	r, err := a.openCareful(ctx, o.ReadData)
	if err != nil {
		return err
	}
	defer r.Close()
	bar := a.newBar("checking")
	o.Progress = bar.set
	rep, err := r.Check(ctx, o)
	bar.end()
	if err != nil {
		return err
	}
	if a.json {
		if err := a.printJSON(checkJSON(rep)); err != nil {
			return err
		}
	} else {
		a.printCheck(rep)
	}
	if rep.Unnoted != nil {
		a.say("warning: the damage could not be noted in the repository, so the next backup may rely on it: %v", rep.Unnoted)
	}
	if rep.Unkept != nil {
		a.say("warning: what was read could not be noted in the repository, so the next check may read it again: %v", rep.Unkept)
	}
	if len(rep.Findings) > 0 {
		return coded{code: exitCorrupt, hint: checkHint(rep),
			err: fmt.Errorf("%s found", plural(int64(len(rep.Findings)), "damaged object"))}
	}
	return nil
}

// checkHint says what to do about the worst that was found.
func checkHint(rep repo.CheckReport) string {
	hits := 0
	for _, f := range rep.Findings {
		if name, ok := strings.CutPrefix(f.Object, "rp/"); ok && errors.Is(f.Err, fault.ErrCorrupt) {
			return fmt.Sprintf(`restore points that are not named here are whole; run "backstay repo repair", or bring %s back from a copy, or give the point up with "backstay point delete %s --force"`, damagedOf(name, f.Err), name)
		}
		hits += len(f.Hits)
	}
	if hits > 0 {
		return "restore points that are not named here are whole; \"backstay repo repair\" heals what it can; back up the VMs that are hit again, which stores again what they still have of it; delete the points that a later check still names"
	}
	var do []string
	for _, w := range []struct{ prefix, do string }{
		{"par/", `"backstay repo repair --scrub" makes damaged parity again`},
		{"keys/", `"backstay repo key remove" is for a damaged key, which may be added again`},
		{"", `"backstay repo vacuum" replaces damaged packs, indexes and notes of which nothing is lost`},
	} {
		if slices.ContainsFunc(rep.Findings, func(f repo.Finding) bool { return hintPrefix(f.Object) == w.prefix }) {
			do = append(do, w.do)
		}
	}
	return "restore points that are not named here are whole; " + strings.Join(do, ", and ")
}

// hintPrefix is what of an object's name says what to do about it.
func hintPrefix(object string) string {
	for _, p := range []string{"par/", "keys/"} {
		if strings.HasPrefix(object, p) {
			return p
		}
	}
	return ""
}

func (a *app) repoVacuumCmd() *cobra.Command {
	var o repo.VacuumOptions
	cmd := &cobra.Command{
		Use:   "vacuum",
		Short: "free the space of chunks that no restore point needs",
		Long: `Free the space of chunks that no restore point needs any more, and of what
interrupted backups left. It needs no key. Backups, restores and deletions may
run at the same time; a running backup says within seconds what it needs. One
that shows no sign of life for --patience is taken for dead: if it wakes up
again it fails, and may be repeated. No data depends on that time. On Linux it
runs with low priority, so that backups on the same machine go first.`,
		Example: `  backstay repo vacuum --dry-run --repo /srv/backup
  backstay repo vacuum --repo /srv/backup
  backstay repo vacuum --waste 1 --repo /srv/backup   # also what is scattered, such as chunks stored twice`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Waste < 1 || o.Waste > 100 {
				return usage("--waste %d: want a percentage from 1 to 100", o.Waste)
			}
			r, err := a.openCareful(cmd.Context(), false)
			if err != nil {
				return err
			}
			defer r.Close()
			letOthersGoFirst()
			bar := a.newBar("vacuum")
			o.Progress = bar.set
			o.Waiting = func(backups int) {
				if backups > 0 {
					fmt.Fprintf(a.stderr, "waiting until running backups and restores have said what they need: %d\n", backups)
				}
			}
			rep, err := r.Vacuum(cmd.Context(), o)
			bar.end()
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(vacuumJSON(rep, o.DryRun))
			}
			verb := "freed"
			if o.DryRun {
				verb = "would free"
			}
			fmt.Fprintf(a.stdout, "%s %s: %s deleted, %s rewritten (%s copied)\n",
				verb, sizeText(rep.FreedBytes), plural(int64(rep.DeletedPacks), "pack"), plural(int64(rep.RewrittenPacks), "pack"), sizeText(rep.RewrittenBytes))
			a.printKept(rep)
			if n, until := r.Spared(); n > 0 {
				last := ""
				if !until.IsZero() {
					last = ", the last until " + until.Local().Format("2006-01-02 15:04")
				}
				fmt.Fprintf(a.stdout, "%s not deleted: the storage keeps them%s\n", plural(int64(n), "object"), last)
			}
			if rep.Revoked > 0 {
				fmt.Fprintf(a.stdout, "%s had been interrupted and can no longer commit\n", plural(int64(rep.Revoked), "session"))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "say what would be freed and change nothing")
	cmd.Flags().IntVar(&o.Waste, "waste", repo.DefaultWaste, "rewrite packs of which so many per cent are waste, from 1 on")
	cmd.Flags().DurationVar(&o.Patience, "patience", repo.DefaultPatience, "how long a running backup may show no sign of life")
	return cmd
}

// printKept says why waste stays.
func (a *app) printKept(rep repo.VacuumReport) {
	for _, k := range []struct {
		packs int
		why   string
	}{
		{rep.Kept.LittleWaste, "little of it is waste (see --waste)"},
		{rep.Kept.InUse, "a running backup stored it or relies on it"},
		{rep.Kept.Damaged, "something in it is damaged and still needed"},
		{rep.Kept.Locked, "the storage keeps it until a time that has not come"},
		{rep.Kept.TooMany, "the next vacuum takes it"},
		{rep.Kept.NoSpace, "there was no space to copy what is needed of it; the next vacuum has what this one freed"},
	} {
		switch {
		case k.packs == 1:
			fmt.Fprintf(a.stdout, "1 pack stays: %s\n", k.why)
		case k.packs > 1:
			fmt.Fprintf(a.stdout, "%d packs stay: for each, %s\n", k.packs, k.why)
		}
	}
	if rep.KeptWasteBytes > 0 {
		fmt.Fprintf(a.stdout, "%s of waste stays in them\n", sizeText(rep.KeptWasteBytes))
	}
}

func vacuumJSON(rep repo.VacuumReport, dry bool) map[string]any {
	return map[string]any{"dry_run": dry, "deleted_packs": rep.DeletedPacks, "rewritten_packs": rep.RewrittenPacks,
		"freed_bytes": rep.FreedBytes, "rewritten_bytes": rep.RewrittenBytes, "kept_waste_bytes": rep.KeptWasteBytes, "kept_packs": rep.Kept,
		"running_sessions": rep.Running, "revoked_sessions": rep.Revoked}
}

func (a *app) printCheck(rep repo.CheckReport) {
	fmt.Fprintf(a.stdout, "%s, %s, %s, %s, %s read\n", plural(rep.Points, "restore point"), plural(rep.Manifests, "manifest"),
		plural(rep.Packs, "pack"), plural(rep.Chunks, "chunk"), sizeText(rep.Bytes))
	a.printFindings(rep)
	for _, f := range rep.Unneeded {
		fmt.Fprintf(a.stdout, "damaged, but no restore point needs what is: %s: %v\n", f.Object, f.Err)
	}
	if len(rep.Unneeded) > 0 {
		fmt.Fprintln(a.stdout, `"backstay repo vacuum" removes it`)
	}
	if rep.Parity.Made > 0 {
		fmt.Fprintf(a.stdout, "parity for %s made that lacked it\n", plural(rep.Parity.Made, "pack"))
	}
	if rep.Parity.Lacking > 0 {
		fmt.Fprintf(a.stdout, "%s without parity; \"backstay repo repair\" makes it\n", plural(rep.Parity.Lacking, "object"))
	}
	fmt.Fprintln(a.stdout, verifiedText(rep.Verified))
	if len(rep.Findings) == 0 {
		fmt.Fprintln(a.stdout, "sound")
	}
}

func (a *app) printFindings(rep repo.CheckReport) {
	for _, f := range rep.Findings {
		fmt.Fprintf(a.stdout, "DAMAGED %s: %v\n", f.Object, f.Err)
		for i, err := range f.More {
			if i == moreShown {
				fmt.Fprintf(a.stdout, "  and %d more places\n", len(f.More)-i)
				break
			}
			fmt.Fprintf(a.stdout, "  also: %v\n", err)
		}
		for _, h := range f.Hits {
			fmt.Fprintf(a.stdout, "  hits %s\n", hitText(h))
		}
		if len(f.Hits) == 0 {
			fmt.Fprintln(a.stdout, "  hits no restore point")
		}
	}
}

// verifiedText says how long ago packs were read.
func verifiedText(v repo.Verified) string {
	share := int64(100)
	if v.Bytes > 0 {
		share = v.RecentBytes * 100 / v.Bytes
	}
	s := fmt.Sprintf("%d %% of %s in packs was read in the last 30 days", share, sizeText(v.Bytes))
	if !v.Oldest.IsZero() {
		s += ", the oldest reading is of " + v.Oldest.Format("2006-01-02")
	}
	if v.Never > 0 {
		s += ", " + plural(v.Never, "pack") + " never was"
	}
	return s
}

// moreShown is how much more of one object is shown to people.
const moreShown = 5

func hitText(h repo.Hit) string {
	var s strings.Builder
	if h.VM != "" {
		s.WriteString(h.VM + "/")
	}
	s.WriteString(string(h.Point))
	if h.Disk != "" {
		fmt.Fprintf(&s, " disk %s", h.Disk)
	}
	if h.Range.Len > 0 {
		fmt.Fprintf(&s, " bytes %d to %d", h.Range.Off, h.Range.End()-1)
	}
	return s.String()
}

func checkJSON(rep repo.CheckReport) map[string]any {
	return map[string]any{"sound": len(rep.Findings) == 0, "points": rep.Points, "manifests": rep.Manifests, "packs": rep.Packs,
		"chunks": rep.Chunks, "read_bytes": rep.Bytes, "findings": findingsJSON(rep.Findings), "unneeded": findingsJSON(rep.Unneeded), "noted": rep.Unnoted == nil,
		"parity": rep.Parity.Kept, "without_parity": rep.Parity.Lacking, "parity_made": rep.Parity.Made, "verified": verifiedJSON(rep.Verified)}
}

func verifiedJSON(v repo.Verified) map[string]any {
	m := map[string]any{"pack_bytes": v.Bytes, "read_in_30_days_bytes": v.RecentBytes, "packs_never_read": v.Never}
	if !v.Oldest.IsZero() {
		m["oldest"] = v.Oldest.Format(time.RFC3339)
	}
	return m
}

func findingsJSON(findings []repo.Finding) any {
	type hit struct {
		VM    string `json:"vm,omitempty"`
		Point string `json:"point"`
		Disk  string `json:"disk,omitempty"`
		Off   int64  `json:"offset_bytes"`
		Len   int64  `json:"length_bytes"`
	}
	type finding struct {
		Object string   `json:"object"`
		Offset int64    `json:"offset"`
		Error  string   `json:"error"`
		More   []string `json:"more,omitempty"`
		Hits   []hit    `json:"hits"`
	}
	fs := []finding{}
	for _, f := range findings {
		hits, more := []hit{}, []string{}
		for _, h := range f.Hits {
			hits = append(hits, hit{h.VM, string(h.Point), string(h.Disk), h.Range.Off, h.Range.Len})
		}
		for _, err := range f.More {
			more = append(more, err.Error())
		}
		fs = append(fs, finding{f.Object, f.Offset, fmt.Sprint(f.Err), more, hits})
	}
	return fs
}

func (a *app) printInfo(i repo.Info) {
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "repository\t%s\n", a.repoURL)
	fmt.Fprintf(w, "id\t%s\n", i.ID)
	fmt.Fprintf(w, "format\t%d\n", i.Format)
	fmt.Fprintf(w, "chunks of\t%s\n", sizeText(i.ChunkBytes))
	fmt.Fprintf(w, "parity\t%s\n", map[bool]string{true: "yes", false: "no"}[i.Parity])
	if i.ImmutableSeconds > 0 {
		fmt.Fprintf(w, "points immutable for\t%s\n", time.Duration(i.ImmutableSeconds)*time.Second)
	}
	fmt.Fprintf(w, "opened by\t%s, %s", plural(int64(i.Passphrases), "passphrase"), plural(int64(i.Recipients), "age recipient"))
	if i.Recovery > 0 {
		fmt.Fprintf(w, ", %s", plural(int64(i.Recovery), "recovery key"))
	}
	if i.Commands > 0 {
		fmt.Fprintf(w, ", %s", plural(int64(i.Commands), "key command"))
	}
	fmt.Fprintln(w)
	fmt.Fprintf(w, "restore points\t%d\n", i.Points)
	if i.Unreadable > 0 {
		fmt.Fprintf(w, "damaged\t%s\n", plural(i.Unreadable, "restore point record"))
	}
	fmt.Fprintf(w, "packs\t%d\n", i.Packs)
	fmt.Fprintf(w, "unique chunks\t%d\n", i.Chunks)
	fmt.Fprintf(w, "stored\t%s\n", sizeText(i.StoredBytes))
	fmt.Fprintf(w, "index in memory\t%s\n", sizeText(i.IndexBytes))
	w.Flush()
}
