package placement

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// Limits of one request.
const (
	MaxChunks     = 65536
	MaxReplicas   = 16
	MaxChunkBytes = 1 << 40
)

// Store is a store as placement sees it.
type Store struct {
	ID            ids.StoreID
	Host          string
	Domain        string // value of the failure-domain label; "": the host
	Up            bool   // reachable and well
	Member        bool   // of the volume the chunks are for
	InSync        bool   // as a member
	CapacityBytes uint64
	UsedBytes     uint64 // live data, as last heard; what compaction gives back is not in use
	Slow          bool   // its class: for chunks that are cold
	Drained       bool   // its host is to be emptied: the last resort
}

// ChunkRequest asks for places of new chunks of one volume.
type ChunkRequest struct {
	Seed       uint64
	Count      int
	Replicas   int
	ChunkBytes uint64
	PreferHost string // the writer's host
	Slow       bool   // slow stores first: the chunks are cold
	// MinReady is how many replicas of a chunk must be on stores that take
	// writes at once: up, and in sync or new to the volume. 0 means all of
	// them. The rest may be on stores that are down or behind: they catch up
	// by joining, so that one dead host does not stop a volume from growing.
	// 0 ≤ MinReady ≤ Replicas.
	MinReady int
	Stores   []Store
}

// Class orders stores before free space does; a lower one is taken first.
type Class int

// The classes. Local comes before Member: one more member is a small price for
// reads that need no network. A store that is down and was never a member is
// the last resort: it would count as in sync and hold up every write until it
// is excluded.
const (
	Local      Class = iota // on the writer's host, ready
	Member                  // in-sync member: the membership stays small
	Fresh                   // ready, but new to the volume
	Behind                  // up, but not in sync yet
	DownBehind              // down, and already out of sync
	DownMember              // down, not yet excluded
	DownFresh               // down, and new to the volume
	Full                    // never taken: no room for one chunk
)

var classNames = [...]string{"local", "member", "fresh", "behind", "down, behind", "down, member", "down, fresh", "full"}

// String returns the class in words.
func (c Class) String() string { return classNames[c] }

// ready says whether a store of the class takes writes at once.
func (c Class) ready() bool { return c <= Fresh }

// Tier comes before Class among stores that are ready, and after it among others.
type Tier int

// The tiers.
const (
	Wanted Tier = iota // of the wanted kind: fast, unless the request says slow
	Other              // of the other kind
	Brim               // of any kind, with little more than the room its chunks grow into
	Last               // on a drained host: a guest's write to a new chunk must not fail for a drain
)

// brimAt is the fill from which a store is left to the chunks it has.
const brimAt = 0.9

var tierNames = [...]string{"", ", of the other kind", ", nearly full", ", drained"}

// tierOf returns a store's tier; mixed says that there are fast and slow ones.
func tierOf(req ChunkRequest, s Store, mixed bool) Tier {
	switch {
	case s.Drained:
		return Last
	case !mixed:
		return Wanted
	case fillOf(s) >= brimAt:
		return Brim
	case s.Slow != req.Slow:
		return Other
	}
	return Wanted
}

// mixed reports whether there are fast and slow stores.
func mixed(stores []Store) bool {
	return slices.ContainsFunc(stores, func(s Store) bool { return s.Slow != stores[0].Slow })
}

// StoreScore is what one store scored, for an explanation.
type StoreScore struct {
	Store  Store
	Class  Class
	Tier   Tier
	Lot    float64 // in [0, 1]: larger first in a class, weighted by free bytes
	Chunks int     // of the request's chunks that were given to it

	planned uint64 // bytes the request has given to it; used + planned may exceed the capacity: chunks are thin
}

// ChunkPlan is an answer and the scores behind it, best first.
type ChunkPlan struct {
	Request ChunkRequest
	Chunks  [][]ids.StoreID // Count × Replicas
	Scores  []StoreScore
}

// PlaceChunks chooses Replicas stores of distinct domains for every chunk:
// never a full one, by tier and class, and inside a class by a lot weighted with
// free bytes. The lot keeps requests of many volumes, which all see the same last
// heartbeat, from piling onto the one emptiest store, and still fills stores
// in proportion to their room (weighted sampling without replacement:
// Efraimidis and Spirakis 2006). The order is drawn once for the request, so
// that its chunks add as few members as possible.
//
// The plan has the scores also when there is an error: Invalid, NoSpace, or
// Unavailable when it would work if what is down came back.
func PlaceChunks(req ChunkRequest) (ChunkPlan, error) {
	plan := ChunkPlan{Request: req}
	if err := req.check(); err != nil {
		return plan, err
	}
	if req.MinReady == 0 {
		req.MinReady = req.Replicas
	}
	plan.Scores = score(req)
	for range req.Count {
		chosen := choose(req, plan.Scores)
		if chosen == nil {
			plan.Chunks = nil
			return plan, missing(req, plan.Scores)
		}
		stores := make([]ids.StoreID, len(chosen))
		for i, s := range chosen {
			s.Chunks++
			s.planned += req.ChunkBytes
			stores[i] = s.Store.ID
		}
		plan.Chunks = append(plan.Chunks, stores)
	}
	return plan, nil
}

// check refuses a request nothing could answer.
func (req ChunkRequest) check() error {
	switch {
	case req.Count < 1 || req.Count > MaxChunks:
		return status.Errorf(status.Invalid, "cannot place %d chunks: ask for 1 to %d at a time", req.Count, MaxChunks)
	case req.Replicas < 1 || req.Replicas > MaxReplicas:
		return status.Errorf(status.Invalid, "cannot place %d replicas of a chunk: 1 to %d are possible", req.Replicas, MaxReplicas)
	case req.MinReady < 0 || req.MinReady > req.Replicas:
		return status.Errorf(status.Invalid, "%d of %d replicas cannot be ready: ask for 1 to %d", req.MinReady, req.Replicas, req.Replicas)
	case req.ChunkBytes == 0 || req.ChunkBytes > MaxChunkBytes:
		return status.Errorf(status.Invalid, "cannot place chunks of %d bytes: 1 byte to %s are possible", req.ChunkBytes, Bytes(MaxChunkBytes))
	}
	seen := make(map[ids.StoreID]bool, len(req.Stores))
	for _, s := range req.Stores {
		if seen[s.ID] {
			return status.Errorf(status.Invalid, "store %s is listed twice in one request", s.ID.Short())
		}
		seen[s.ID] = true
	}
	return nil
}

// score classes every store, draws its lot and sorts, best first.
func score(req ChunkRequest) []StoreScore {
	scores := make([]StoreScore, 0, len(req.Stores))
	var most uint64
	for _, s := range req.Stores {
		most = max(most, free(s.CapacityBytes, s.UsedBytes))
	}
	fills := map[bool]float64{false: meanFill(req.Stores, false), true: meanFill(req.Stores, true)}
	both := mixed(req.Stores)
	for _, s := range req.Stores {
		if s.Domain == "" {
			s.Domain = s.Host
		}
		fill := fills[s.Slow]
		sc := StoreScore{Store: s, Class: classOf(req, s)}
		if sc.Class.ready() || s.Drained {
			sc.Tier = tierOf(req, s, both)
		}
		if hot(s, fill) && (sc.Class == Local || sc.Class == Member) {
			sc.Class = Fresh
		}
		if f := free(s.CapacityBytes, s.UsedBytes); f > 0 {
			sc.Lot = math.Pow(draw(req.Seed, s.ID[:]), float64(most)/(float64(f)*lean(s, fill)))
		}
		scores = append(scores, sc)
	}
	slices.SortFunc(scores, func(a, b StoreScore) int {
		switch {
		case a.Class.ready() && b.Class.ready() && a.Tier != b.Tier:
			return int(a.Tier - b.Tier)
		case a.Class != b.Class:
			return int(a.Class - b.Class)
		case a.Tier != b.Tier:
			return int(a.Tier - b.Tier)
		case a.Lot > b.Lot:
			return -1
		case a.Lot < b.Lot:
			return 1
		}
		return slices.Compare(a.Store.ID[:], b.Store.ID[:])
	})
	return scores
}

// meanFill is the part in use of all stores of a kind that are up, together.
func meanFill(stores []Store, slow bool) float64 {
	used, capacity := 0.0, 0.0
	for _, s := range stores {
		if s.Up && s.Slow == slow {
			used, capacity = used+float64(min(s.UsedBytes, s.CapacityBytes)), capacity+float64(s.CapacityBytes)
		}
	}
	if capacity == 0 {
		return 0
	}
	return used / capacity
}

func fillOf(s Store) float64 { return float64(s.UsedBytes) / float64(max(s.CapacityBytes, 1)) }

// hotOver is how much fuller than the mean a store may be and still be preferred
// for being local or a member, as a part of the mean; hotLeast is what is no
// difference at all.
const (
	hotOver  = 0.03
	hotLeast = 0.01
)

// hot reports whether a store is so much fuller than the mean that it is not
// preferred.
func hot(s Store, mean float64) bool { return fillOf(s) > mean+max(hotOver*mean, hotLeast) }

// lean weighs a store by how its fill differs from the mean: 1 at the mean, next
// to nothing where it is hot, more where it is emptier, so that a new store fills
// faster than others without taking everything.
func lean(s Store, mean float64) float64 {
	return min(max(1-(fillOf(s)-mean)/max(hotOver*mean, hotLeast), 0.02), 4)
}

func classOf(req ChunkRequest, s Store) Class {
	member, behind := s.Member && s.InSync, s.Member && !s.InSync
	switch {
	case free(s.CapacityBytes, s.UsedBytes) < req.ChunkBytes:
		return Full
	case !s.Up && behind:
		return DownBehind
	case !s.Up && member:
		return DownMember
	case !s.Up:
		return DownFresh
	case behind:
		return Behind
	case req.PreferHost != "" && s.Host == req.PreferHost:
		return Local
	case member:
		return Member
	}
	return Fresh
}

// choose takes the best store of each of the best domains for one chunk, or
// nil. Four passes over the sorted stores: ready ones with room for all that
// the request gave them; ready ones with room for one chunk (chunks are thin:
// what was planned is mostly never written); ready ones of drained hosts; the rest.
func choose(req ChunkRequest, scores []StoreScore) []*StoreScore {
	var chosen []*StoreScore
	taken := make(map[string]bool, req.Replicas)
	ready := 0
	for pass := range 4 {
		for i := range scores {
			s := &scores[i]
			if s.Class == Full || (pass < 3 && !s.Class.ready()) {
				break // sorted: nothing usable comes after
			}
			roomy := free(s.Store.CapacityBytes, s.Store.UsedBytes) >= s.planned+req.ChunkBytes
			if taken[s.Store.Domain] || (pass == 0 && !roomy) || (pass < 2 && s.Tier == Last) {
				continue
			}
			taken[s.Store.Domain] = true
			chosen = append(chosen, s)
			if s.Class.ready() {
				ready++
			}
			if len(chosen) == req.Replicas {
				if ready < req.MinReady {
					return nil
				}
				return chosen
			}
		}
	}
	return nil
}

// missing says what a request lacks and which domains could be it.
func missing(req ChunkRequest, scores []StoreScore) error {
	domains, noun := bestOfDomains(scores)
	ready, roomy := 0, 0
	for _, s := range domains {
		if s.Class.ready() {
			ready++
		}
		if s.Class != Full {
			roomy++
		}
	}
	kind, todo := status.NoSpace, "add stores or free space"
	need, have, what := req.Replicas, roomy, "with free space"
	if roomy >= req.Replicas {
		kind, todo = status.Unavailable, "bring one back or ask again"
		need, have, what = req.MinReady, ready, "with free space that are up and in sync"
	}
	var why []string
	for _, s := range domains {
		if s.Class == Full || (kind == status.Unavailable && !s.Class.ready()) {
			why = append(why, lack(s))
		}
	}
	text := fmt.Sprintf("a chunk of %s needs %s %s, there %s", Bytes(req.ChunkBytes), plural(need, noun), what, isAre(have))
	if len(why) > 0 {
		text += ": " + list(why)
	}
	return status.Errorf(kind, "%s; %s", text, todo)
}

// bestOfDomains returns the best store of each domain, by the domains' names,
// and what a domain is called.
func bestOfDomains(scores []StoreScore) (best []*StoreScore, noun string) {
	noun = "host"
	seen := map[string]bool{}
	for i := range scores { // sorted: the first of a domain is its best
		s := &scores[i]
		if s.Store.Domain != s.Store.Host {
			noun = "failure domain"
		}
		if !seen[s.Store.Domain] {
			seen[s.Store.Domain] = true
			best = append(best, s)
		}
	}
	slices.SortFunc(best, func(a, b *StoreScore) int { return strings.Compare(a.Store.Domain, b.Store.Domain) })
	return best, noun
}

func isAre(n int) string {
	switch n {
	case 0:
		return "is none"
	case 1:
		return "is 1"
	}
	return fmt.Sprintf("are %d", n)
}

// lack says why a domain's best store, which is not ready, is not.
func lack(s *StoreScore) string {
	d, room := s.Store.Domain, Bytes(free(s.Store.CapacityBytes, s.Store.UsedBytes))
	switch {
	case s.Class == Behind:
		return d + " is still catching up"
	case s.Class != Full:
		return d + " is down"
	case !s.Store.Up:
		return fmt.Sprintf("%s is down and full (%s free)", d, room)
	}
	return fmt.Sprintf("%s is full (%s of %s free)", d, room, Bytes(s.Store.CapacityBytes))
}

// Explain is a table of every store's scores, best first.
func (p ChunkPlan) Explain() string {
	rows := [][]string{{"STORE", "HOST", "DOMAIN", "CLASS", "FREE", "LOT", "CHUNKS"}}
	for _, s := range p.Scores {
		rows = append(rows, []string{s.Store.ID.Short(), s.Store.Host, s.Store.Domain, s.Class.String() + tierNames[s.Tier],
			Bytes(free(s.Store.CapacityBytes, s.Store.UsedBytes)), fmt.Sprintf("%.3f", s.Lot), fmt.Sprint(s.Chunks)})
	}
	return Table(rows)
}

// Table pads cells to columns, two blanks apart, without trailing blanks.
func Table(rows [][]string) string {
	width := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, cell := range r {
			width[i] = max(width[i], len(cell))
		}
	}
	var b strings.Builder
	for _, r := range rows {
		var line strings.Builder
		for i, cell := range r {
			fmt.Fprintf(&line, "%-*s  ", width[i], cell)
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	return b.String()
}
