package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Severities of a finding.
const (
	notice   = "notice"   // as somebody has asked for, or soon worth a look
	warning  = "warning"  // something is gone, nothing is lost
	critical = "critical" // one more loss takes data or service away, or has
)

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
	for _, h := range w.Hosts {
		out = append(out, hostHealth(w, h, now)...)
	}
	out = append(out, spaceHealth(w)...)
	for _, v := range w.Volumes {
		out = append(out, volumeHealth(w, v)...)
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
	var silent, older []string
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
		out = append(out, finding{Severity: sev, What: fmt.Sprintf("metadata node %s does not answer: %d of %d do", strings.Join(silent, ", "), up, voters), Means: means,
			Next: "start it again; if its machine is lost, `cairn meta add --replace`"})
	}
	return out
}

func hostHealth(w *clusterView, h hostView, now time.Time) (out []finding) {
	if h.Drained {
		out = append(out, finding{Severity: notice, What: fmt.Sprintf("host %s is drained: it gets nothing new", h.Name), Next: "`cairn host resume " + h.Name + "` ends it"})
	}
	if !h.Up {
		since := "some time before the metadata leader was elected: it has not been heard of since"
		if h.LastSeenMs >= 0 {
			since = now.Add(-time.Duration(h.LastSeenMs) * time.Millisecond).Format("2006-01-02 15:04:05")
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
	for _, s := range h.Stores {
		if s.State != "ok" && !s.Retired {
			out = append(out, finding{Severity: warning, What: fmt.Sprintf("store %s on host %s: %s", s.ID[:8], h.Name, s.State),
				Means: "its copies are left out; the others serve", Next: "replace the disk and retire the store (`cairn store retire`)"})
		}
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
	if perSecond <= 0 || watched < time.Minute {
		return "it does not fill now"
	}
	left := time.Duration(min(room/uint64(perSecond), 1<<31)) * time.Second
	return fmt.Sprintf("at the rate of the last %v (%s/s) it is full in %v", watched.Round(time.Minute), formatSize(uint64(perSecond)), left.Round(time.Minute))
}

func spaceHealth(w *clusterView) (out []finding) {
	var used, capacity uint64
	var rate int64
	var watched time.Duration
	for _, h := range w.Hosts {
		for _, s := range h.Stores {
			if s.Retired || s.Capacity == 0 {
				continue
			}
			used, capacity, rate = used+s.Used, capacity+s.Capacity, rate+s.FillRate
			over := time.Duration(s.WatchedMs) * time.Millisecond
			watched = max(watched, over)
			if sev := level(s.Used * 100 / s.Capacity); sev != "" {
				out = append(out, finding{sev, fmt.Sprintf("store %s on host %s is %d %% full", s.ID[:8], h.Name, s.Used*100/s.Capacity), "",
					"full, it takes no new data: writes wait or fail for want of space; deletes and TRIM go on",
					whenFull(s.Capacity-min(s.Used, s.Capacity), s.FillRate, over) + "; add stores, or remove data"})
			}
		}
	}
	if capacity == 0 {
		return out
	}
	if sev := level(used * 100 / capacity); sev != "" {
		out = append(out, finding{sev, fmt.Sprintf("the pool is %d %% full: %s of %s", used*100/capacity, formatSize(used), formatSize(capacity)), "",
			"a lost host's copies need room elsewhere", whenFull(capacity-min(used, capacity), rate, watched) + "; add hosts or stores, or purge deleted volumes"})
	}
	return out
}

// volumeHealth says what is missing of a volume's copies, which stands for all
// of its chunks that lie there.
func volumeHealth(w *clusterView, v volumeView) (out []finding) {
	if v.Closed {
		out = append(out, finding{Severity: warning, What: fmt.Sprintf("volume %s came out of a metadata backup and is closed", v.Name), Means: "it cannot be attached",
			Next: "`cairn volume trust " + v.Name + "` once you are sure of it"})
	}
	var missing []string
	oldest := int64(0)
	for _, m := range v.Members {
		if m.InSync {
			continue
		}
		missing = append(missing, fmt.Sprintf("%s on %s", m.Store[:min(8, len(m.Store))], m.Host))
		if oldest == 0 || m.outUnixNs > 0 && m.outUnixNs < oldest {
			oldest = m.outUnixNs
		}
	}
	if len(missing) == 0 {
		return out
	}
	left := int(v.Replicas) - len(missing)
	f := finding{Severity: warning, What: fmt.Sprintf("volume %s: %d of its %d stores are out of sync (%s)", v.Name, len(missing), len(v.Members), some(missing)), Since: "a time that was not noted"}
	if oldest > 0 {
		f.Since = formatTime(oldest)
	}
	switch {
	case left <= 1:
		f.Severity = critical
		f.Means = "chunks that lie there may have one good copy left: losing it loses data"
	default:
		f.Means = fmt.Sprintf("chunks that lie there have %d good copies left", left)
	}
	f.Next = "the copies catch up when their stores are back"
	if v.Holder == "" {
		f.Next += " and the volume is attached: `cairn volume attach " + v.Name + "`"
	}
	return append(out, f)
}
