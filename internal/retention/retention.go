// Package retention decides which restore points of a VM to keep, each with
// its reasons. It is pure: it reads no clock and no store, and gives the same
// answer for the same points.
//
// Time is that of the points alone. "Within 14 days" counts back from the
// newest point, so a clock that jumps ahead lets nothing go, and a VM whose
// backups stopped keeps what it has. What the time is can only keep more.
package retention

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A Rule says how many points to keep. Each count names that many periods that
// have a point, not that many periods of the calendar: a VM that was off for a
// month keeps as many daily points as one that was on.
type Rule struct {
	Last    int // newest points
	Hourly  int
	Daily   int
	Weekly  int // weeks begin on Monday, as in ISO 8601
	Monthly int
	Yearly  int
	Within  Age // everything that is no older than this before the newest point
	// Zone says where days begin; nil is UTC.
	Zone *time.Location
	// MayEmpty lets even the newest point of the VM go where the rule keeps
	// nothing.
	MayEmpty bool
	// Now, where it is not zero, is what the time is. Points of more than a day
	// later were made by a clock that was wrong: they stay, and count for no
	// rule, so that they neither take the place of others nor make them look old.
	Now time.Time
}

// A Point is what a decision needs to know of a restore point.
type Point struct {
	ID   string
	Time time.Time
	// Suspect points may rest on change tracking that lied. Where a period has
	// another point, that one represents it.
	Suspect bool
	// Protected is why the point is kept whatever the rule says; empty if it is
	// not.
	Protected string
}

// A Decision says what becomes of a point, and why.
type Decision struct {
	Point
	Keep    bool
	Reasons []string // in the rule's order; for a point that goes, one
}

// ErrNoRule says that a rule would keep nothing at all.
var ErrNoRule = errors.New("the rule keeps nothing: say how many points to keep")

// Decide applies rule to the points of one VM and returns a decision for each,
// newest first. Points of one time go by ID. The newest sound point is always
// kept, since a VM with points shall not end without one, unless the rule says
// that it may.
func Decide(points []Point, rule Rule) ([]Decision, error) {
	if err := rule.check(); err != nil {
		return nil, err
	}
	all := make([]Decision, len(points))
	for i, p := range points {
		all[i].Point = p
	}
	slices.SortFunc(all, func(a, b Decision) int {
		if c := b.Time.Compare(a.Time); c != 0 {
			return c
		}
		return strings.Compare(b.ID, a.ID)
	})
	if len(all) == 0 {
		return all, nil
	}
	for i := range all {
		if why := all[i].Protected; why != "" {
			all[i].keep(why)
		}
	}
	made, empty := all, rule.MayEmpty && rule.keepsNothing()
	for !empty && !rule.Now.IsZero() && len(made) > 0 && made[0].Time.After(rule.Now.Add(24*time.Hour)) {
		made[0].keep("its time is still to come")
		made = made[1:]
	}
	if len(made) == 0 {
		return all, nil
	}
	rule.keepLast(made)
	zone := rule.Zone
	if zone == nil {
		zone = time.UTC
	}
	for _, p := range periods {
		p.apply(made, *p.count(&rule), zone)
	}
	if rule.Within != (Age{}) {
		since := rule.Within.Before(made[0].Time.In(zone))
		for i := range made {
			if !made[i].Time.Before(since) {
				made[i].keep("within " + rule.Within.String())
			}
		}
	}
	newest := slices.IndexFunc(made, func(d Decision) bool { return !d.Suspect })
	if newest < 0 {
		newest = 0
	}
	if !empty && !made[newest].Keep {
		made[newest].keep("the newest sound point of its VM")
	}
	for i := range all {
		if !all[i].Keep {
			all[i].Reasons = []string{"no rule keeps it"}
		}
	}
	return all, nil
}

func (d *Decision) keep(reason string) {
	d.Keep = true
	d.Reasons = append(d.Reasons, reason)
}

func (r Rule) check() error {
	for _, n := range r.counts() {
		if n < 0 {
			return fmt.Errorf("%d points: want 0 or more", n)
		}
	}
	if r.keepsNothing() && !r.MayEmpty {
		return ErrNoRule
	}
	return nil
}

func (r Rule) counts() []int {
	return []int{r.Last, r.Hourly, r.Daily, r.Weekly, r.Monthly, r.Yearly}
}

func (r Rule) keepsNothing() bool {
	return !slices.ContainsFunc(r.counts(), func(n int) bool { return n > 0 }) && r.Within == (Age{})
}

// keepLast keeps the newest sound points, and suspect ones only if the sound
// ones do not suffice.
func (r Rule) keepLast(all []Decision) {
	kept := 0
	for _, suspect := range []bool{false, true} {
		for i := range all {
			if all[i].Suspect == suspect && kept < r.Last {
				kept++
				all[i].keep(fmt.Sprintf("last %d", kept))
			}
		}
	}
}

// A period is a stretch of the calendar that one point stands for.
type period struct {
	name  string
	count func(*Rule) *int
	label func(time.Time) string
}

var periods = []period{
	{"hourly", func(r *Rule) *int { return &r.Hourly }, func(t time.Time) string { return t.Format("2006-01-02 15h -0700") }},
	{"daily", func(r *Rule) *int { return &r.Daily }, func(t time.Time) string { return t.Format("2006-01-02") }},
	{"weekly", func(r *Rule) *int { return &r.Weekly }, func(t time.Time) string {
		y, w := t.ISOWeek()
		return fmt.Sprintf("%d-W%02d", y, w)
	}},
	{"monthly", func(r *Rule) *int { return &r.Monthly }, func(t time.Time) string { return t.Format("2006-01") }},
	{"yearly", func(r *Rule) *int { return &r.Yearly }, func(t time.Time) string { return t.Format("2006") }},
}

// apply keeps the newest sound point of each of the n latest periods that have
// a point; a period that has only suspect ones keeps the newest of these.
func (p period) apply(all []Decision, n int, zone *time.Location) {
	for i := 0; i < len(all) && n > 0; n-- {
		label := p.label(all[i].Time.In(zone))
		best := i
		for ; i < len(all) && p.label(all[i].Time.In(zone)) == label; i++ {
			if all[best].Suspect && !all[i].Suspect {
				best = i
			}
		}
		all[best].keep(p.name + " " + label)
	}
}
