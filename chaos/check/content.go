package check

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// The content of a register is a row of cells of 16 bytes, the last one cut
// short by the register's end:
//
//	0        8                 16
//	| value  | mix(seed, register, value, cell) | …
//
// Every cell repeats the value, so a read that mixes two writes at any place
// is recognised (Torn) and tearing can be told in words; the mix makes content
// of another run, another register or another place in the register foreign.
// The value zero is all zero bytes.
const cellBytes = 16

// BlockBytes is the size of a block.
const BlockBytes = 4096

// partBounds are where the parts of a split block begin, and its end: unequal
// and off any sector or word, so that every kind of partial write happens.
var partBounds = [...]int{0, 512, 1000, 2048, 2560, 3333, 3584, 4080, BlockBytes}

const partsPerBlock = len(partBounds) - 1

// partShift leaves block numbers 56 bits; part p of block b is the register
// b | (p+1)<<partShift, and a whole block is the register b.
const partShift = 56

// span is one register's place on the device.
type span struct {
	register uint64
	off      int64 // from the area's start
	n        int
}

func partSpan(block uint64, part int) span {
	from := partBounds[part]
	return span{register: block | uint64(part+1)<<partShift,
		off: int64(block)*BlockBytes + int64(from), n: partBounds[part+1] - from}
}

// RegisterName says what a history's Block field stands for.
func RegisterName(register uint64) string {
	if part := register >> partShift; part != 0 {
		return fmt.Sprintf("block %d part %d", register&(1<<partShift-1), part-1)
	}
	return fmt.Sprintf("block %d", register)
}

// fill writes v's content for the register into p.
func fill(p []byte, seed, register uint64, v Value) {
	if v == 0 {
		clear(p)
		return
	}
	var cell [cellBytes]byte
	key := contentKey(seed, register, v)
	for i := 0; i*cellBytes < len(p); i++ {
		putCell(cell[:], v, key, i)
		copy(p[i*cellBytes:], cell[:])
	}
}

// identify returns the value whose content p is, or Torn.
func identify(p []byte, seed, register uint64) Value {
	v := Value(binary.LittleEndian.Uint64(p))
	if v == Torn {
		return Torn
	}
	var cell [cellBytes]byte
	key := contentKey(seed, register, v)
	for i := 0; i*cellBytes < len(p); i++ {
		if v != 0 {
			putCell(cell[:], v, key, i)
		}
		part := p[i*cellBytes:]
		part = part[:min(len(part), cellBytes)]
		if string(part) != string(cell[:len(part)]) {
			return Torn
		}
	}
	return v
}

// tornAccountMaxRuns bounds the runs of equal cells explainTorn tells.
const tornAccountMaxRuns = 8

// explainTorn tells which bytes of p hold what.
func explainTorn(p []byte, seed, register uint64) string {
	var out strings.Builder
	from, runs, last := 0, 0, ""
	flush := func(to int) {
		if to > from {
			fmt.Fprintf(&out, "; bytes %d-%d %s", from, to-1, last)
			runs++
		}
		from = to
	}
	for at := 0; at < len(p) && runs < tornAccountMaxRuns; at += cellBytes {
		now := cellName(p[at:min(at+cellBytes, len(p))], seed, register, at/cellBytes)
		if now != last {
			flush(at)
			last = now
		}
	}
	if runs < tornAccountMaxRuns {
		flush(len(p))
	} else {
		out.WriteString("; …")
	}
	return RegisterName(register) + " is torn" + out.String()
}

func cellName(p []byte, seed, register uint64, index int) string {
	if strings.Trim(string(p), "\x00") == "" {
		return "zeroes"
	}
	if len(p) < 8 {
		return "cut short"
	}
	v := Value(binary.LittleEndian.Uint64(p))
	var want [cellBytes]byte
	putCell(want[:], v, contentKey(seed, register, v), index)
	if string(p) != string(want[:len(p)]) {
		return "of no write to this place in this run"
	}
	return "of write " + v.String()
}

func putCell(cell []byte, v Value, key uint64, index int) {
	binary.LittleEndian.PutUint64(cell, uint64(v))
	binary.LittleEndian.PutUint64(cell[8:], mix(key+uint64(index)))
}

func contentKey(seed, register uint64, v Value) uint64 {
	return mix(mix(mix(seed)+register) + uint64(v))
}

// mix is splitmix64's output function (Steele, Lea and Flood 2014): a
// bijection that spreads every input bit.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
