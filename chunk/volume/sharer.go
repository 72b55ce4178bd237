package volume

import (
	"math"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
)

// Some volumes of a host are promised a minimum: operations or bytes a second
// that they get while they ask for them, whatever their neighbours do. What they
// compete for (this process, the stores' disks, the links) is not known and
// changes; so nothing is reserved. Promises are accounted for, and neighbours are
// held back while one is behind:
//
//  1. debt      Each promise runs up a debt in time and pays it with what its
//     volume finishes, as the reservation tags of mClock do (Gulati and others,
//     OSDI 2010). Who asks for nothing is owed nothing.
//  2. lower     While one is behind, all others share a level: none gets more than
//     it, or than its own promise. It begins below what the busiest had and is
//     lowered until the debt goes down.
//  3. raise     When all debts are paid the level rises, until it holds nobody.
//  4. forgive   A volume that a hard-held neighbourhood does not make faster is
//     slow by itself (it asks for too little at a time, say). Its promise is let
//     be for a while, longer each time.
//
// A scheduler in front of the stores, as mClock is one, would have to stand
// between every operation and its disk: a queue and a lock that all volumes of a
// host share. This one is looked at five times a second.
//
// Promised to a volume of both, either one keeps the promise.

const (
	shareEvery   = 200 * time.Millisecond // between two looks
	shareBehind  = 0.1                    // seconds of promise: a debt above it is behind
	shareCredit  = -0.2                   // seconds of promise that may be saved up
	shareDebtMax = 0.5                    // seconds of promise that are remembered
	shareLower   = 0.7                    // of the level, per look
	shareRaise   = 1.1
	shareLeast   = 8.0  // units a second that the level leaves everybody
	sharePatient = 12   // looks after which a volume must have become faster
	shareFaster  = 1.1  // than before, to be worth it
	shareOpBytes = 16e3 // bytes that cost as much as an operation
	shareLetBe   = 5 * time.Second
	shareLetMost = 5 * time.Minute
)

// Claim is what a volume is promised and what it has had.
type Claim struct {
	Volume            ids.VolumeID
	MinIOPS, MinBytes uint64 // promised per second; 0: nothing
	Ops, Bytes        uint64 // finished since it was attached here
	Open              uint64 // operations that wait for their answer
}

// Sharer decides what each volume of a host gets while one that is promised a
// minimum is behind. The zero value is ready.
type Sharer struct {
	at    time.Duration // of the last look
	level float64       // units a second; 0: nobody is held back
	seen  map[ids.VolumeID]*claimState
}

// claimState is what is remembered of a volume between looks.
type claimState struct {
	ops, bytes   uint64
	open         uint64
	opsPerSecond float64 // at the last looks, the older the less
	bytesPer     float64
	debt         float64 // seconds of promise: shareCredit ≤ debt ≤ shareDebtMax
	behind       int     // looks in a row that it was
	before       float64 // its units a second when it fell behind
	letBe        time.Duration
	wait         time.Duration // of the next letting be
	live         bool
}

// units is what operations and bytes cost together.
func units(ops, bytes float64) float64 { return ops + bytes/shareOpBytes }

// Step looks at all volumes; held has their new bounds in the same order, and is
// nil when it is not time yet.
func (s *Sharer) Step(now time.Duration, claims []Claim) (held []Share) {
	if s.seen == nil {
		s.seen, s.at = map[ids.VolumeID]*claimState{}, now-shareEvery
	}
	dt := (now - s.at).Seconds()
	if now-s.at < shareEvery {
		return nil
	}
	s.at = now
	behind, waiting, busiest := false, false, 0.0
	for _, st := range s.seen {
		st.live = false
	}
	for i := range claims {
		st := s.account(now, &claims[i], dt)
		behind = behind || st.behind > 0
		waiting = waiting || st.debt > 0
	}
	for id, st := range s.seen {
		if !st.live {
			delete(s.seen, id)
		} else if st.behind == 0 {
			busiest = max(busiest, units(st.opsPerSecond, st.bytesPer))
		}
	}
	s.move(behind, waiting, busiest)
	held = make([]Share, len(claims))
	for i := range claims {
		if st := s.seen[claims[i].Volume]; s.level > 0 && st.behind == 0 {
			held[i] = st.share(&claims[i], s.level)
		}
	}
	return held
}

// account enters what a volume has had since the last look.
func (s *Sharer) account(now time.Duration, c *Claim, dt float64) *claimState {
	st := s.seen[c.Volume]
	if st == nil || c.Ops < st.ops || c.Bytes < st.bytes { // new, or attached again
		st = &claimState{ops: c.Ops, bytes: c.Bytes, wait: shareLetBe}
		s.seen[c.Volume] = st
	}
	ops, bytes := float64(c.Ops-st.ops), float64(c.Bytes-st.bytes)
	asked := st.open > 0 && c.Open > 0
	st.ops, st.bytes, st.open, st.live = c.Ops, c.Bytes, c.Open, true
	st.opsPerSecond = (st.opsPerSecond + ops/dt) / 2
	st.bytesPer = (st.bytesPer + bytes/dt) / 2
	if c.MinIOPS == 0 && c.MinBytes == 0 || !asked {
		st.debt, st.behind = 0, 0
		return st
	}
	paid := 0.0
	if c.MinIOPS > 0 {
		paid = ops / float64(c.MinIOPS)
	}
	if c.MinBytes > 0 {
		paid = max(paid, bytes/float64(c.MinBytes))
	}
	st.debt = min(max(st.debt+dt-paid, shareCredit), shareDebtMax)
	had := units(ops, bytes) / dt
	switch {
	case now < st.letBe:
		st.debt, st.behind = 0, 0
	case st.debt <= shareBehind:
		if st.behind = 0; st.debt <= 0 {
			st.wait = shareLetBe
		}
	case st.behind == 0:
		st.behind, st.before = 1, had
	case st.behind >= sharePatient && had < st.before*shareFaster:
		st.letBe, st.wait = now+st.wait, min(2*st.wait, shareLetMost)
		st.debt, st.behind = 0, 0
	default:
		st.behind++
	}
	return st
}

// move lowers or raises the level.
func (s *Sharer) move(behind, waiting bool, busiest float64) {
	switch {
	case behind && s.level == 0:
		s.level = max(busiest*shareLower, shareLeast)
	case behind:
		s.level = max(s.level*shareLower, shareLeast)
	case waiting || s.level == 0:
	case s.level > 2*busiest && s.level > shareLeast*2:
		s.level = 0
	default:
		s.level *= shareRaise
	}
}

// share is the level in operations and bytes as the volume mixes them, and no
// less than its promise.
func (st *claimState) share(c *Claim, level float64) Share {
	all := units(st.opsPerSecond, st.bytesPer)
	if all < 1 { // idle: whatever it begins with
		return Share{IOPS: max(uint64(math.Ceil(level)), c.MinIOPS), Bytes: max(uint64(level*shareOpBytes), c.MinBytes)}
	}
	ops, bytes := st.opsPerSecond/all, st.bytesPer/all
	if c.MinIOPS > 0 && ops > 0 {
		level = max(level, shareRaise*float64(c.MinIOPS)/ops)
	}
	if c.MinBytes > 0 && bytes > 0 {
		level = max(level, shareRaise*float64(c.MinBytes)/bytes)
	}
	return Share{IOPS: uint64(math.Ceil(level * ops)), Bytes: uint64(math.Ceil(level * bytes))}
}
