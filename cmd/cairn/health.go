package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// Severities of a finding.
const (
	notice   = "notice"   // as somebody has asked for, or soon worth a look
	warning  = "warning"  // something is gone, nothing is lost
	critical = "critical" // one more loss takes data or service away, or has
)

// rank orders severities: 0 notice, 1 warning, 2 critical.
func rank(severity string) int { return slices.Index([]string{notice, warning, critical}, severity) }

// finding is something that is wrong: evidence, not a colour.
type finding struct {
	Severity string `json:"severity"`
	What     string `json:"what"`
	Since    string `json:"since,omitempty"` // when it began, or that nobody knows
	Means    string `json:"means,omitempty"` // for which volumes, what
	Next     string `json:"next,omitempty"`  // what happens by itself, or what to do
}

// sentence is the finding in one line.
func (f finding) sentence() string {
	s := f.What
	if f.Since != "" {
		s += " (since " + f.Since + ")"
	}
	for _, more := range []string{f.Means, f.Next} {
		if more != "" {
			s += "; " + more
		}
	}
	return s
}

func (f finding) print() {
	mark := map[string]string{notice: "-", warning: "!", critical: "!!"}[f.Severity]
	since := ""
	if f.Since != "" {
		since = ", since " + f.Since
	}
	fmt.Printf("%s %s%s\n", mark, f.What, since)
	if f.Means != "" {
		fmt.Println("    means: " + f.Means)
	}
	if f.Next != "" {
		fmt.Println("    next:  " + f.Next)
	}
}

func (w *clusterView) find(fs ...finding) {
	for _, f := range fs {
		w.Evidence = append(w.Evidence, f)
		w.Problems = append(w.Problems, f.sentence())
	}
}

func noMetadata(err error) finding {
	return finding{critical, "the metadata service does not answer: " + strings.TrimPrefix(err.Error(), "the metadata service gives no answer: "), "",
		"guests go on reading, and writing where space is allocated, while every store with a copy answers; nothing can be attached, allocated, excluded or changed",
		"it comes back by itself when a majority of its nodes is up"}
}

// Thresholds of space, in percent, and of a metadata node's disk.
const (
	poolNotice, poolWarning, poolCritical = 75, 85, 95
	metaDiskWarning                       = 1 << 30
	metaDiskCritical                      = 256 << 20
)

// health looks for what is wrong in a picture of the cluster. It is pure.
func health(w *clusterView, now time.Time) (out []finding) {
	out = append(out, metaHealth(w.Meta)...)
	out = append(out, clockHealth(w)...)
	out = append(out, programHealth(w)...)
	for _, h := range w.Hosts {
		out = append(out, hostHealth(w, h, now)...)
	}
	out = append(out, spaceHealth(w)...)
	away := w.away(now)
	for _, v := range w.Volumes {
		out = append(out, serviceHealth(v, now)...)
		out = append(out, badHealth(v, away)...)
		out = append(out, volumeHealth(v, away, w.room(v))...)
	}
	for _, t := range w.Tenants {
		for _, q := range []struct {
			what        string
			used, quota uint64
		}{{"sizes", t.Logical, t.LogicalQuota}, {"space", t.Physical, t.PhysicalQuota}} {
			if q.quota > 0 && q.used*100 >= q.quota*poolCritical {
				out = append(out, finding{Severity: notice, What: fmt.Sprintf("tenant %s has used %s of its quota of %s", t.Name, ofQuota(q.used, q.quota), q.what),
					Means: "its volumes cannot grow, be written to in new places, or be created, beyond it", Next: "remove volumes, or raise it with `cairn tenant set`"})
			}
		}
	}
	return out
}

func metaHealth(ms []metaView) (out []finding) {
	voters, up, newest, uses := 0, 0, uint32(0), uint32(0)
	var silent, older, since []string
	for _, m := range ms {
		newest, uses = max(newest, m.Knows), max(uses, m.Uses)
	}
	at := map[uint64]metaView{}
	for _, m := range ms {
		name := m.Name
		if name == "" {
			name = m.Addr
		}
		if m.Role == "learner" {
			out = append(out, finding{Severity: notice, What: fmt.Sprintf("metadata node %s learns and does not vote yet", name), Next: "`cairn meta add` finishes when it has caught up"})
			continue
		}
		voters++
		if m.State == "unreachable" {
			silent = append(silent, name)
			if m.Heard == "" {
				m.Heard = "some time before the leader was elected"
			}
			if !slices.Contains(since, m.Heard) {
				since = append(since, m.Heard)
			}
			continue
		}
		up++
		if m.Knows < newest {
			older = append(older, fmt.Sprintf("%s (%d)", name, m.Knows))
		}
		if o, ok := at[m.Applied]; ok && o.StateHash != m.StateHash {
			out = append(out, finding{critical, fmt.Sprintf("metadata nodes %s and %s have different states after the same command %d", o.Name, name, m.Applied), "",
				"one of the two is wrong", "stop the one that does not lead, move its directory away and start it: it gets everything from the others"})
		}
		at[m.Applied] = m
		if m.FreeBytes > 0 && m.FreeBytes < metaDiskWarning {
			sev := warning
			if m.FreeBytes < metaDiskCritical {
				sev = critical
			}
			out = append(out, finding{sev, fmt.Sprintf("metadata node %s has %s left on its disk", name, formatSize(m.FreeBytes)), "",
				"below 64 MiB it refuses what is new, below 16 MiB everything", "make room there; it goes on by itself"})
		}
	}
	if len(older) > 0 {
		out = append(out, finding{notice, fmt.Sprintf("metadata nodes run programs of different versions: the newest knows state version %d, %s older ones", newest, strings.Join(older, ", ")), "",
			fmt.Sprintf("the cluster uses version %d; what is newer is refused, and the others may still go back", uses), "upgrade these nodes too; the newer version is then used by itself"})
	}
	if len(silent) > 0 {
		left := up - voters/2 - 1
		sev, means := warning, fmt.Sprintf("%d more may fail before nothing can be changed", max(0, left))
		if left <= 0 {
			sev = critical
		}
		if left < 0 {
			means = "nothing can be changed; guests go on while every store with a copy answers"
		}
		out = append(out, finding{Severity: sev, What: fmt.Sprintf("metadata node %s does not answer: %d of %d do", strings.Join(silent, ", "), up, voters), Since: strings.Join(since, ", "), Means: means,
			Next: "start it again; if its machine is lost, `cairn meta add --replace`"})
	}
	return out
}

func hostHealth(w *clusterView, h hostView, now time.Time) (out []finding) {
	if h.Drained {
		out = append(out, drainHealth(w, h))
	}
	if !h.Up {
		since := "some time before the metadata leader was elected: it has not been heard of since"
		switch {
		case h.LastSeenMs >= 0:
			since = formatTime(now.Add(-time.Duration(h.LastSeenMs) * time.Millisecond).UnixNano())
		case h.toldUnixNs > 0:
			since = formatTime(h.toldUnixNs) + " at the latest"
		}
		var copies, held []string
		for _, v := range w.Volumes {
			for _, m := range v.Members {
				if m.Host == h.Name && !slices.Contains(copies, v.Name) {
					copies = append(copies, v.Name)
				}
			}
			if v.Holder == h.Name {
				held = append(held, v.Name)
			}
		}
		means, next := "no volume has a copy there", "it takes part again by itself when it is back"
		if len(copies) > 0 {
			means = "without their copy there: " + some(copies)
			next = "the copies catch up by themselves when it is back; what stays away for longer than replace_after (10 minutes) is made on other hosts with room"
		}
		if len(held) > 0 {
			means += fmt.Sprintf("; attached there and without service: %s", some(held))
			next += "; `cairn volume attach --takeover` serves a volume elsewhere"
		}
		out = append(out, finding{warning, "host " + h.Name + " is down", since, means, next})
		return out
	}
	if h.Silent {
		out = append(out, finding{Severity: warning, What: fmt.Sprintf("host %s sends heartbeats and does not answer this machine at %s within %v", h.Name, h.Control, hostWait),
			Means: "what it does for its volumes is not known here, and commands on it fail", Next: "see whether its process hangs (its log), and whether this machine reaches that address"})
	}
	for _, s := range h.Stores {
		switch {
		case s.Retired:
			out = append(out, retiredHealth(w, h, s)...)
		case s.State != "ok":
			out = append(out, storeHealth(w, h, s))
		}
	}
	return out
}

func storeHealth(w *clusterView, h hostView, s storeView) finding {
	f := finding{Severity: warning, What: fmt.Sprintf("store %s on host %s: %s", s.ID[:8], h.Name, s.State), Means: "no volume has a copy there",
		Next: fmt.Sprintf("replace the disk, and `cairn store retire %s`: what was there is made again from the other copies", s.ID[:8])}
	if s.State == "down" {
		f.What = fmt.Sprintf("store %s: host %s is up and does not have it open; its log says why", s.ID[:8], h.Name)
	}
	oldest := int64(0)
	for _, v := range w.Volumes {
		for _, m := range v.Members {
			if m.Store == s.ID && m.outUnixNs > 0 && (oldest == 0 || m.outUnixNs < oldest) {
				oldest = m.outUnixNs
			}
		}
	}
	if oldest > 0 {
		f.Since = formatTime(oldest)
	}
	if copies := w.copiesOn(s.ID); len(copies) > 0 {
		f.Means = fmt.Sprintf("its copies are left out, the others serve: %s", some(copies))
	}
	return f
}

// copiesOn names the volumes that have a store as a member.
func (w *clusterView) copiesOn(store string) (out []string) {
	for _, v := range w.Volumes {
		if slices.ContainsFunc(v.Members, func(m memberView) bool { return m.Store == store }) {
			out = append(out, v.Name)
		}
	}
	return out
}

// retiredHealth says how far a retirement is; one that is over and whose disk is
// gone is no news any more.
func retiredHealth(w *clusterView, h hostView, s storeView) []finding {
	copies := w.copiesOn(s.ID)
	f := finding{Severity: notice, What: fmt.Sprintf("store %s on host %s is retired: it gets nothing new", s.ID[:8], h.Name), Means: "nothing is left there", Next: "its disk may go; `cairn store rm` then forgets it"}
	switch {
	case len(copies) > 0:
		f.Means, f.Next = "still there: copies of "+some(copies), "they go to other stores by themselves, if there is room"
	case s.State == "down":
		return nil
	}
	f.Next += fmt.Sprintf("; `cairn store retire --undo %s` puts it into service again", s.ID[:8])
	return []finding{f}
}

// badHealth says which blocks of a volume's copies cannot be read.
func badHealth(v volumeView, away map[string]awayStore) (out []finding) {
	good := 0 // copies that may have what another one lacks
	for _, m := range v.Members {
		if _, gone := away[m.Store]; m.InSync && !gone {
			good++
		}
	}
	for _, m := range v.Members {
		if m.BadBlocks == 0 {
			continue
		}
		f := finding{Severity: warning, What: fmt.Sprintf("volume %s: its copy on host %s (store %s) has %s", v.Name, m.Host, m.Store[:8], count(int(m.BadBlocks), "damaged block")),
			Means: "they are read from the other copies; those that no copy has are answered with an I/O error",
			Next:  "its gateway writes them anew from a good copy within a minute; what stays has none, until it is written over. A disk that does it again should go: `cairn store retire " + m.Store[:8] + "`"}
		if v.Holder == "" {
			f.Next = "they are written anew when it is attached: `cairn volume attach " + v.Name + "`"
		}
		if v.Replicas == 1 || good < 2 {
			f.Severity, f.Means = critical, "no other copy can be asked: their reads are answered with an I/O error, everything else is well"
			f.Next = "they are well again once they are written over: restore them from a backup, or what its guest finds broken; `cairn store show " + m.Store[:8] + "` lists them"
		}
		out = append(out, f)
	}
	return out
}

// domain is the failure domain a host is in, as metadata reckons it.
func (h hostView) domain(label string) string {
	switch {
	case label == "" || label == "host":
		return h.Name
	case h.Labels[label] != "":
		return h.Labels[label]
	}
	return "host=" + h.Name
}

// room says where copies of a volume can be made.
func (w *clusterView) room(v volumeView) (r room) {
	r.label = v.Domain
	seen := map[string]bool{}
	for _, h := range w.Hosts {
		if h.Up && !h.Drained && slices.ContainsFunc(h.Stores, func(s storeView) bool { return s.State == "ok" && !s.Retired }) {
			seen[h.domain(v.Domain)] = true
		}
	}
	r.domains = len(seen)
	return r
}

// room is how many failure domains of a kind have a store in service.
type room struct {
	label   string
	domains int
}

func (r room) String() string {
	return count(r.domains, r.label)
}

// drainHealth says how far a drain is, and what it cannot do.
func drainHealth(w *clusterView, h hostView) finding {
	f := finding{Severity: notice, What: fmt.Sprintf("host %s is drained: it gets nothing new", h.Name), Means: "nothing is left there",
		Next: "`cairn host resume " + h.Name + "` ends it; `cairn host rm " + h.Name + "` forgets the host"}
	var copies, held, stuck, short []string
	in := ""
	for _, v := range w.Volumes {
		r := w.room(v)
		few := r.domains < int(v.Replicas)
		if few {
			short, in = append(short, v.Name), r.String()
		}
		if slices.ContainsFunc(v.Members, func(m memberView) bool { return m.Host == h.Name }) {
			if copies = append(copies, v.Name); few {
				stuck = append(stuck, v.Name)
			}
		}
		if v.Holder == h.Name {
			held = append(held, v.Name)
		}
	}
	if len(short) > 0 {
		f.What = fmt.Sprintf("host %s is drained: it gets nothing new but what has no other place", h.Name)
		f.Severity = warning
	}
	var left []string
	if len(copies) > 0 {
		left = append(left, "copies of "+some(copies))
	}
	if len(held) > 0 {
		left = append(left, "attached there: "+some(held))
	}
	if len(left) == 0 && len(short) == 0 {
		return f
	}
	if len(left) == 0 {
		left = []string{"nothing"}
	}
	f.Means, f.Next = "still there: "+strings.Join(left, "; "), "copies go to other hosts by themselves; `cairn host resume "+h.Name+"` ends it"
	if len(held) > 0 {
		f.Next += fmt.Sprintf("; what is attached by hand stays: `cairn volume attach %s --host … --hand-over` moves it", held[0])
	}
	if len(short) > 0 {
		f.Means += fmt.Sprintf("; new chunks of %s go there too, so that they can be written to", some(short))
	}
	if len(stuck) > 0 {
		f.Next = fmt.Sprintf("it cannot finish: %s want more copies in different places than the %s in service; add a host, or fewer copies (`cairn volume set --replicas`); `cairn host resume %s` ends it", some(stuck), in, h.Name)
	}
	return f
}

// maxClockOff is how far a clock may be off before somebody is told.
const maxClockOff = 10 * time.Second

// clockHealth compares clocks with this machine's; if most are off by about the
// same, it is this one that is.
func clockHealth(w *clusterView) (out []finding) {
	const dependsNot = "; reads and writes do not depend on it"
	var all []int64
	for _, m := range w.Meta {
		if m.State != "unreachable" {
			all = append(all, m.ClockMs)
		}
	}
	for _, h := range w.Hosts {
		if h.answers {
			all = append(all, h.ClockMs)
		}
	}
	slices.Sort(all)
	mine, whose := int64(0), "this machine's"
	if n := len(all); n > 2 && apart(all[n/2]) {
		mine, whose = all[n/2], "most others'"
		out = append(out, finding{Severity: notice, What: fmt.Sprintf("the clock of this machine is %s that of most of the cluster", off(-mine)), Means: "what is said here of times is off by as much",
			Next: "set it (chrony, ntpd)" + dependsNot})
	}
	compare := func(who string, ms int64, means string) {
		if apart(ms - mine) {
			out = append(out, finding{Severity: notice, What: fmt.Sprintf("the clock of %s is %s %s", who, off(ms-mine), whose), Means: means,
				Next: "set it (chrony, ntpd), there or here" + dependsNot})
		}
	}
	for _, m := range w.Meta {
		if m.State != "unreachable" {
			compare("metadata node "+m.Name, m.ClockMs, "while it leads, events have its time, and deadlines (undelete, undo-shrink, join tokens) are reckoned by it")
		}
	}
	for _, h := range w.Hosts {
		if h.answers {
			compare("host "+h.Name, h.ClockMs, "its log has wrong times")
		}
	}
	return out
}

func apart(ms int64) bool { return (time.Duration(ms) * time.Millisecond).Abs() >= maxClockOff }

// off says how a clock differs.
func off(ms int64) string {
	d := (time.Duration(ms) * time.Millisecond).Round(time.Second)
	if d < 0 {
		return fmt.Sprintf("%v behind", -d)
	}
	return fmt.Sprintf("%v ahead of", d)
}

// programHealth says who runs which program, if not all run the same.
func programHealth(w *clusterView) []finding {
	by := map[string][]string{}
	for _, m := range w.Meta {
		if m.State != "unreachable" {
			by[m.Program] = append(by[m.Program], m.Name)
		}
	}
	for _, h := range w.Hosts {
		if h.answers {
			by[h.Program] = append(by[h.Program], h.Name)
		}
	}
	if len(by) < 2 {
		return nil
	}
	var each []string
	for p, who := range by {
		if p == "" {
			p = "one that does not say which"
		}
		each = append(each, p+" on "+some(who))
	}
	slices.Sort(each)
	return []finding{{notice, "programs of different versions run: " + strings.Join(each, "; "), "", "an upgrade is half done, or a machine was forgotten",
		"bring all to one version: the metadata nodes first, then the hosts, one after the other"}}
}

// erredFor is for how long a request that was answered with an error is told.
const erredFor = time.Hour

// serviceHealth says why a volume's users wait, or had errors.
func serviceHealth(v volumeView, now time.Time) (out []finding) {
	if at := time.Unix(0, v.erredAt); v.erred > 0 && now.Sub(at) < erredFor {
		f := finding{Severity: critical, What: fmt.Sprintf("volume %s: requests of its users were answered with an error (%d of them, the last at %s: %s)", v.Name, v.erred, formatTime(v.erredAt), v.erredBy),
			Means: "its guest sees them, and may have gone read-only", Next: "if a block has no good copy left, `cairn store scrub` tells which, and it is well again once it is written over, from a backup; new requests go through where copies are whole. This is told for an hour"}
		if v.erredBy == status.NoSpace.String() {
			f.Severity = warning
			f.Means, f.Next = "new places of it cannot be written to", "stores, or its tenant's quota, are full, or the rest is set aside for thick volumes: `cairn df`, `cairn tenant ls`; new requests go through when there is room. This is told for an hour"
		}
		out = append(out, f)
	}
	if v.serves != "" && !strings.HasPrefix(v.serves, "serving") {
		out = append(out, finding{Severity: critical, What: fmt.Sprintf("volume %s does not serve on host %s: %s", v.Name, v.Holder, v.serves), Means: "its reads and writes wait",
			Next: "it serves by itself once that is over"})
	}
	if v.full > 0 {
		out = append(out, finding{Severity: critical, What: fmt.Sprintf("volume %s: writes wait for room on %s (%d of them)", v.Name, strings.Join(v.fullOn, ", "), v.full), Means: "its user hangs; nothing is lost, and reads go on",
			Next: "they go on by themselves when there is room: add a store, or remove or trim data"})
	}
	return out
}

// some names the first of many.
func some(names []string) string {
	const most = 5
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

func level(percent uint64) string {
	switch {
	case percent >= poolCritical:
		return critical
	case percent >= poolWarning:
		return warning
	case percent >= poolNotice:
		return notice
	}
	return ""
}

// whenFull says when room is used up at the rate seen lately.
func whenFull(room uint64, perSecond int64, watched time.Duration) string {
	switch {
	case watched < time.Minute:
		return "how fast it fills is not known yet"
	case perSecond <= 0:
		return "it does not fill now"
	}
	left := time.Duration(min(room/uint64(perSecond), 1<<31)) * time.Second
	return fmt.Sprintf("at the rate of the last %v (%s/s) it is full in %v", watched.Round(time.Minute), formatSize(uint64(perSecond)), left.Round(time.Minute))
}

// comesBack says how much of what is in use holds nothing any more, if it is worth a
// word.
func comesBack(used, live, capacity uint64) string {
	if used < live || used-live < capacity/20 {
		return ""
	}
	return fmt.Sprintf("; %s of it was overwritten or removed, and comes back by compaction", formatSize(used-live))
}

func spaceHealth(w *clusterView) (out []finding) {
	var used, live, capacity uint64
	var rate int64
	var watched time.Duration
	for _, h := range w.Hosts {
		for _, s := range h.Stores {
			if s.Retired || s.Capacity == 0 || s.State == "down" && s.Used == 0 { // of one that is away nothing is known: it is not empty for that
				continue
			}
			used, live, capacity, rate = used+s.Used, live+s.Live, capacity+s.Capacity, rate+s.FillRate
			over := time.Duration(s.WatchedMs) * time.Millisecond
			watched = max(watched, over)
			if sev := level(s.Used * 100 / s.Capacity); sev != "" {
				out = append(out, finding{sev, fmt.Sprintf("store %s on host %s is %d %% full", s.ID[:8], h.Name, s.Used*100/s.Capacity), "",
					"a full store takes no new data: writes wait or fail for want of space; deletes and TRIM go on",
					whenFull(s.Capacity-min(s.Used, s.Capacity), s.FillRate, over) + comesBack(s.Used, s.Live, s.Capacity) + "; add stores, or remove data"})
			}
		}
	}
	if capacity == 0 {
		return out
	}
	if sev := level(used * 100 / capacity); sev != "" {
		since := ""
		if m := w.mark; m.GetUnixNs() > 0 && level(uint64(m.Percent)) == sev {
			since = formatTime(m.UnixNs)
		}
		out = append(out, finding{sev, fmt.Sprintf("the pool is %d %% full: %s of %s", used*100/capacity, formatSize(used), formatSize(capacity)), since,
			"a lost host's copies need room elsewhere", whenFull(capacity-min(used, capacity), rate, watched) + comesBack(used, live, capacity) + "; add hosts or stores, or purge deleted volumes"})
	}
	return out
}

// away says of each store that cannot be reached why, and since when.
func (w *clusterView) away(now time.Time) map[string]awayStore {
	out := map[string]awayStore{}
	for _, h := range w.Hosts {
		for _, s := range h.Stores {
			switch {
			case !h.Up:
				a := awayStore{why: "host down"}
				if h.LastSeenMs >= 0 {
					a.unixNs = now.Add(-time.Duration(h.LastSeenMs) * time.Millisecond).UnixNano()
				}
				out[s.ID] = a
			case s.State != "ok":
				out[s.ID] = awayStore{why: s.State}
			}
		}
	}
	return out
}

type awayStore struct {
	why    string
	unixNs int64 // 0: nobody knows
}

// volumeHealth says what is missing of a volume's copies, which stands for all
// of its chunks that lie there: what is out of sync, and what cannot be reached.
func volumeHealth(v volumeView, away map[string]awayStore, r room) (out []finding) {
	if v.Closed {
		out = append(out, finding{Severity: warning, What: fmt.Sprintf("volume %s came out of a metadata backup and is closed", v.Name), Means: "it cannot be attached",
			Next: "`cairn volume trust " + v.Name + "` once you are sure of it"})
	}
	var missing, joining, unreached []string
	oldest := int64(0)
	for _, m := range v.Members {
		a, gone := away[m.Store]
		if m.InSync && !gone {
			continue
		}
		name := fmt.Sprintf("%s on %s", m.Store[:min(8, len(m.Store))], m.Host)
		switch {
		case gone:
			name += ": " + a.why
		case m.State == "joining":
			joining = append(joining, fmt.Sprintf("%s has got %s", name, formatSize(m.JoinedBytes)))
			name += ": catching up"
		case v.Holder != "":
			name += ": well, and not reached by " + v.Holder
			unreached = append(unreached, m.Host)
		}
		missing = append(missing, name)
		at := m.outUnixNs
		if m.InSync {
			at = a.unixNs
		}
		if at > 0 && (oldest == 0 || at < oldest) {
			oldest = at
		}
	}
	if len(missing) == 0 {
		return out
	}
	left := int(v.Replicas) - len(missing)
	f := finding{Severity: warning, What: fmt.Sprintf("volume %s: %d of its %d stores are out of sync or away (%s)", v.Name, len(missing), len(v.Members), some(missing)), Since: "a time that was not noted"}
	if oldest > 0 {
		f.Since = formatTime(oldest)
	}
	switch {
	case left <= 0:
		f.Severity = critical
		f.Means = "chunks that lie nowhere else can be neither read nor written: whoever asks waits; nothing is lost while these stores are whole"
	case left == 1:
		f.Severity = critical
		f.Means = "chunks that lie there may have one good copy left: losing it loses data"
	default:
		f.Means = fmt.Sprintf("chunks that lie there have %d good copies left", left)
	}
	switch {
	case len(joining) == len(missing):
		f.Next = "they catch up now: " + some(joining)
	case v.Holder == "":
		f.Next = "when their stores are back, the copies catch up within a minute or two, or at once if the volume is attached: `cairn volume attach " + v.Name + "`"
	default:
		f.Next = "the copies catch up when their stores are back"
	}
	if len(unreached) > 0 {
		f.Next = fmt.Sprintf("the copies catch up within seconds once host %s reaches the data address of %s (`cairn host show`): if it stays so, look at the network between the two (`cairn net show`, firewall, cable)", v.Holder, some(unreached))
	}
	switch {
	case len(joining) == len(missing):
	case r.domains < int(v.Replicas):
		f.Next += fmt.Sprintf("; there is nowhere else to make them: it wants %d copies in different places, and stores are in service in %s", v.Replicas, r)
	default:
		f.Next += "; what stays away for longer than replace_after (10 minutes) is made on other stores"
	}
	return append(out, f)
}
